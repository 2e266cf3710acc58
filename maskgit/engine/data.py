"""Data sets of images: what is in them, in which order they come, and how they are varied.

Everything random here is a pure function of a seed and of numbers that count samples, so that a
run can go on at any step, with any number of workers, and see what it would have seen.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maskgit.common import UserError, pick
from maskgit.engine.images import BadImage, decode, fit
from maskgit.engine.loader import Pairs, load
from maskgit.engine.order import Order
from maskgit.engine.sources import (
    BUNDLED_SHARDS,
    Item,
    Source,
    expand_shards,
    list_bundled,
    list_folder,
    list_shards,
)

log = logging.getLogger(__name__)

CROPS = {"center": False, "random": True}
SPLITS = {"train": False, "heldout": True}
CACHE_BYTES = 512 * 2**20  # decoded images kept in memory, per process


@dataclass
class DataConfig:
    """Which images, at what size, and how they are varied in training."""

    path: str = "emoji"  # a bundled set (emoji, emoji:tones, emoji:heldout), a folder, or shards
    size: list[int] = field(default_factory=lambda: [64, 64])  # height, width in pixels
    crop: str = "center"  # center, or random (of at least 0.8 times the sides)
    mirror: bool = True  # half of the training images come mirrored ...
    no_mirror: list[str] = field(default_factory=list)  # ... except those of these classes
    balanced: bool = False  # each class equally often, whatever its size
    heldout: float = 0.1  # the share of one's own images that is never trained on
    max_broken: float = 0.01  # stop when more than this share of the files cannot be used
    max_pixels: int = 2**26  # a file of more pixels counts as broken
    workers: int = 0  # processes that decode images


class ImageSet(Dataset):
    """A set of images, map style: `images[i]` is image i as it is; `get` can vary it.

    classes: names, [] for images without classes. labels: a class number each, -1 for none.
    fingerprint: a hash of names, sizes and labels, to stamp what is computed from the set.
    broken: the path and the reason of each file found unusable so far.
    """

    def __init__(self, items: list[Item], classes: list[str], config: DataConfig, files: int):
        self.items, self.classes, self.config = items, classes, config
        self.files = files  # of all splits: what config.max_broken is a share of
        self.labels = [item.label for item in items]
        self.broken: dict[str, str] = {}
        self._kept: dict[int, np.ndarray] = {}
        self._room = CACHE_BYTES
        self._size = (config.size[0], config.size[1])
        self._unmirrored = set(config.no_mirror)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.get(index)

    @property
    def fingerprint(self) -> str:
        lines = [f"{item.name}\t{item.size}\t{item.label}" for item in self.items]
        return hashlib.sha256("\n".join([*lines, *self.classes]).encode()).hexdigest()

    def may_mirror(self, index: int) -> bool:
        """Whether image `index` may be shown mirrored: its class is not one of `no_mirror`."""
        label = self.labels[index]
        known = self.classes[label] if label >= 0 else None
        return self.config.mirror and known not in self._unmirrored

    def get(self, index: int, draw: int | None = None, seed: int = 0) -> dict[str, Any]:
        """image uint8 (3, H, W), label, index, broken.

        Without `draw` the image comes cropped in the middle and never mirrored; with it, crop and
        mirroring are a function of (seed, index, draw). In place of an unusable file comes the
        next usable one, whose `index` it is; `broken` has the path and the reason of each file
        passed over. Raises UserError when too many in a row are unusable.
        """
        broken: dict[str, str] = {}
        for used in ((index + i) % len(self) for i in range(len(self))):
            try:
                pixels = self._pixels(used)
                break
            except BadImage as error:
                broken[self.items[used].where] = str(error)
                self._check(broken)
        else:
            raise UserError(f"no usable image in {self.config.path}: {_list_files(broken)}")
        random = None if draw is None else np.random.default_rng([seed, used, draw])
        pixels = fit(pixels, self._size, random if CROPS[self.config.crop] else None)
        if random is not None and self.may_mirror(used) and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, H, W)
        return {"image": image, "label": self.labels[used], "index": used, "broken": broken}

    def report(self, broken: dict[str, str]) -> None:
        """Count unusable files, log each once; raises UserError when there are too many."""
        for path, reason in broken.items():
            if path not in self.broken:
                log.warning("skipped %s: %s", path, reason)
        self.broken.update(broken)
        self._check(self.broken)

    def _check(self, broken: dict[str, str]) -> None:
        if len(broken) > self.config.max_broken * self.files:
            raise UserError(
                f"{len(broken)} of {self.files} files cannot be used, more than "
                f"max_broken={self.config.max_broken:g} allows: {_list_files(broken)}"
            )

    def _pixels(self, index: int) -> np.ndarray:
        if index in self._kept:
            return self._kept[index]
        item, limit = self.items[index], self.config.max_pixels
        if item.size > 8 * limit:  # 16 bits a channel, uncompressed
            raise BadImage(f"oversized: {item.size} bytes")
        try:
            content = item.read()
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        pixels = decode(content, self._size, limit)
        if pixels.nbytes <= self._room:
            self._kept[index] = pixels
            self._room -= pixels.nbytes
        return pixels


def _list_files(broken: dict[str, str], most: int = 20) -> str:
    listed = ", ".join(f"{path} ({reason})" for path, reason in list(broken.items())[:most])
    return listed + (f", and {len(broken) - most} more" if len(broken) > most else "")


def open_images(config: DataConfig, split: str = "train") -> ImageSet:
    """The images that `config.path` names: a bundled set, shards (braces allowed), or a folder.

    A bundled set has its own held-out drawings; of others, the share `config.heldout` is held out
    by hash of the name, so that a file stays where it is when others come or go. Held-out images
    are never varied. Raises UserError for a path that is missing or has no images, and for settings
    that make no sense.
    """
    _check_config(config)
    heldout = pick(SPLITS, split, "split")
    bundled = config.path in BUNDLED_SHARDS
    source = list_bundled(config.path, split) if bundled else _list(config.path)
    items = source.items if bundled else _split(source.items, config, heldout)
    unknown = sorted(set(config.no_mirror) - set(source.classes))
    if 0 < len(unknown) < len(config.no_mirror):
        log.warning("data.no_mirror: %s has no class %s", config.path, ", ".join(unknown))
    if heldout or config.path == "emoji:heldout":
        config = replace(config, crop="center", mirror=False)
    return ImageSet(items, source.classes, config, files=len(source.items))


def _list(path: str) -> Source:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return list_folder(folder)
    if shards := expand_shards(path):
        return list_shards(shards)
    if folder.exists():
        raise UserError(f"{path} is a file: data.path takes a folder or uncompressed tar shards")
    known = ", ".join(BUNDLED_SHARDS)
    raise UserError(f"no data at {path}: not a folder, not shards, not a bundled set ({known})")


def _split(items: list[Item], config: DataConfig, heldout: bool) -> list[Item]:
    """The held-out items, or the others; with a share above 0, at least one of two is held out."""
    hashes = [hashlib.sha256(item.name.encode()).digest() for item in items]
    limit = config.heldout * 2.0**64
    held = {i for i, digest in enumerate(hashes) if int.from_bytes(digest[:8]) < limit}
    if config.heldout > 0 and len(items) > 1 and len(held) in (0, len(items)):
        held = {min(range(len(items)), key=hashes.__getitem__)}
    chosen = [item for i, item in enumerate(items) if (i in held) == heldout]
    if not chosen:
        raise UserError(
            f"no {'held-out' if heldout else 'training'} images in {config.path}: "
            f"{len(items)} in all, data.heldout={config.heldout:g}"
        )
    return chosen


def _check_config(config: DataConfig) -> None:
    pick(CROPS, config.crop, "data.crop")
    if len(config.size) != 2 or min(config.size) < 1:
        raise UserError(f"data.size={list(config.size)}: give height and width, such as [64, 64]")
    if not 0 <= config.heldout < 1:
        raise UserError(f"data.heldout={config.heldout}: a share from 0 to below 1")
    if not 0 <= config.max_broken <= 1:
        raise UserError(f"data.max_broken={config.max_broken}: a share from 0 to 1")


def batches(
    images: ImageSet,
    batch_size: int,
    *,
    seed: int = 0,
    start_step: int = 0,
    balanced: bool = False,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Endless training batches of one process: image uint8 (B, 3, H, W), label, index and seed
    int64 (B,), the seed being that of the sample (see `sample_seeds`).

    `batch_size` is that of a step, over all processes: B = batch_size / world_size. Process `rank`
    has its B after those of the processes before it, so that the samples of a step are a function
    of (seed, step), and in their order, whatever the number of processes and of `workers`.
    Unusable files are counted in `images.broken`; raises UserError when there are too many, and for
    a batch that cannot be shared evenly.
    """
    order, share = Order(images.labels, seed, balanced), share_of(batch_size, world_size)

    def plan() -> Iterator[Pairs]:
        for step in count(start_step):
            first = step * batch_size + rank * share
            yield [(order(draw), draw) for draw in range(first, first + share)]

    return load(images, plan(), seed, workers)


def share_of(batch_size: int, world_size: int) -> int:
    """The images of a step that each process has; UserError where they cannot be shared evenly."""
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"train.batch_size={batch_size} cannot be shared evenly by {world_size} processes: "
            f"give a multiple of {world_size}"
        )
    return batch_size // world_size


def in_order(images: ImageSet, batch_size: int, workers: int = 0) -> Iterator[dict[str, Tensor]]:
    """Each usable image once, as it is, in the set's order: batches as those of `batches`, but
    without seeds.

    Unusable files are left out, so that a batch may be smaller.
    """

    def plan() -> Iterator[Pairs]:
        for start in range(0, len(images), batch_size):
            yield [(i, None) for i in range(start, min(start + batch_size, len(images)))]

    return load(images, plan(), 0, workers)
