"""What is scored, and against what: sets of images, and files of statistics."""

import hashlib
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image
from torch import Tensor

from maskgit.common import UserError
from maskgit.common.folder import file_hash
from maskgit.common.progress import progress
from maskgit.engine.data import DataConfig
from maskgit.engine.images import BadImage, decode, fit
from maskgit.engine.sources import (
    BUNDLED_SHARDS,
    Item,
    Source,
    expand_shards,
    list_bundled,
    list_folder,
    list_shards,
)
from maskgit.evaluation import npz
from maskgit.evaluation.npz import Size, to_tensor

THREADS = min(8, os.cpu_count() or 1)  # that read and decode images ahead of their use
MAX_PIXELS = DataConfig.max_pixels

T = TypeVar("T")


@dataclass(eq=False)
class PixelSet:
    """Images of one size, in a fixed order, read anew each time."""

    name: str  # as it was given
    kind: str  # folder, shards, npz or bundled
    hash: str  # SHA-256 of the bytes of the files, whatever they are called
    labels: list[int | None]  # the class of each image
    classes: list[str]  # names, [] for images without classes
    size: Size  # of what `batches` gives
    jpeg: int  # how many of the files are JPEG, whatever their suffix
    resized: int  # how many images had another size, and so were cropped and scaled
    _readers: Callable[[int], Iterable[Callable[[], Tensor]]]  # batch size -> one a batch
    _threads: int = THREADS

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All images once, uint8 (B, 3, H, W), read in threads while the last ones are in use.

        Raises UserError for an image that cannot be used: without it the number would be another.
        """
        return ahead(self._readers(batch_size), self._threads)


@dataclass(eq=False)
class StatisticsFile:
    """Mean and covariance of the features of a set of images, computed elsewhere."""

    name: str
    hash: str  # SHA-256 of the file
    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64
    images: PixelSet | None  # a part of the set, where the file has any (ADM's do)


def open_set(source: str, size: Size | None = None) -> PixelSet | StatisticsFile:
    """A bundled set ("emoji", "emoji:heldout"), an image folder, tar shards (braces allowed), or an
    `.npz` file of images (`arr_0`, classes in `arr_1`) or of statistics (`mu`, `sigma`).

    With `size` every image is cropped in the middle to that aspect and scaled to it; without, all
    must have one size. Raises UserError for whatever is missing, foreign, broken or empty.
    """
    if source in BUNDLED_SHARDS:
        return _open_files(source, "bundled", list_bundled(source, "train"), size)
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_files(source, "folder", list_folder(path), size)
    if path.suffix == ".npz":
        return _open_npz(source, path, size)
    if shards := expand_shards(source):
        return _open_files(source, "shards", list_shards(shards), size)
    known = ", ".join(BUNDLED_SHARDS)
    problem = "is a file of another kind" if path.exists() else "is not there"
    raise UserError(f"{source} {problem}: give a folder, .tar shards, an .npz file, or {known}")


def open_pixels(source: str, size: Size | None = None) -> PixelSet:
    """`open_set` where only images will do. Raises UserError for statistics, too."""
    found = open_set(source, size)
    if isinstance(found, StatisticsFile):
        raise UserError(f"{source} holds statistics: what is scored has to be images")
    return found


# Files: folders and shards


class _Seen(NamedTuple):
    digest: bytes
    jpeg: bool
    size: Size


def _open_files(name: str, kind: str, source: Source, size: Size | None) -> PixelSet:
    items, looks = source.items, (partial(_look, item) for item in source.items)
    seen = list(progress(ahead(looks, THREADS), f"reading {name}", len(items), "images"))
    first = seen[0].size
    for item, one in zip(items, seen, strict=True):
        if size is None and one.size != first:
            raise UserError(
                f"{items[0].where} has {first[1]}x{first[0]} pixels, {item.where} has "
                f"{one.size[1]}x{one.size[0]}: give --size, and all are cropped and scaled to it"
            )
    target = size or first

    def readers(batch_size: int) -> Iterator[Callable[[], Tensor]]:
        for start in range(0, len(items), batch_size):
            yield partial(_decode, items[start : start + batch_size], target)

    return PixelSet(
        name=name,
        kind=kind,
        hash=hashlib.sha256(b"".join(one.digest for one in seen)).hexdigest(),
        labels=[item.label if item.label >= 0 else None for item in items],
        classes=source.classes,
        size=target,
        jpeg=sum(one.jpeg for one in seen),
        resized=sum(one.size != target for one in seen),
        _readers=readers,
    )


def _look(item: Item) -> _Seen:
    """What can be said of an image file without decoding it."""
    content = read(item)
    try:
        with Image.open(io.BytesIO(content)) as image:
            size = image.height, image.width
            # Of a PNG, Pillow would decode all pixels to look for the rare mark behind them.
            if image.format != "PNG" or "exif" in image.info:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                size = size[::-1] if turned else size
            jpeg = image.format in ("JPEG", "MPO")
    except Exception as error:  # on damaged bytes, decoders raise nearly anything
        reason = str(error).split("<")[0].strip() or type(error).__name__
        raise unusable(item, reason) from None
    return _Seen(hashlib.sha256(content).digest(), jpeg, size)


def _decode(items: list[Item], size: Size) -> Tensor:
    """The images uint8 (B, 3, H, W)."""
    images = []
    for item in items:
        try:
            images.append(fit(decode(read(item), size, MAX_PIXELS), size))
        except BadImage as error:
            raise unusable(item, str(error)) from None
    return to_tensor(np.stack(images))


def read(item: Item) -> bytes:
    if item.size == 0:
        raise unusable(item, "empty, or a sample without an image")
    if item.size > 8 * MAX_PIXELS:  # 16 bits a channel, uncompressed
        raise unusable(item, f"oversized: {item.size} bytes")
    try:
        return item.read()
    except OSError as error:
        raise unusable(item, error.strerror or str(error)) from None


def unusable(item: Item, reason: str) -> UserError:
    return UserError(f"{item.where} cannot be used ({reason}): mend it, or move it elsewhere")


# npz files


def _open_npz(name: str, path: Path, size: Size | None) -> PixelSet | StatisticsFile:
    with npz.opened(path) as archive:
        keys = {member.removesuffix(".npy") for member in archive.namelist()}
        digest = file_hash(path)
    images = _open_array(name, path, digest, "arr_1" in keys, size) if "arr_0" in keys else None
    if {"mu", "sigma"} <= keys:
        return StatisticsFile(name, digest, *npz.read_statistics(path), images)
    if images is None:
        raise UserError(
            f"{path} holds {', '.join(sorted(keys)) or 'nothing'}: images are arr_0 (uint8, "
            "N x height x width x 3), statistics are mu and sigma"
        )
    return images


def _open_array(name: str, path: Path, digest: str, labelled: bool, size: Size | None) -> PixelSet:
    with npz.opened(path) as archive, archive.open("arr_0.npy") as stream:
        count, height, width, _ = npz.read_header(stream, path)
    target = size or (height, width)
    labels = npz.read_labels(path, count) if labelled else None

    def readers(batch_size: int) -> Iterator[Callable[[], Tensor]]:
        # A compressed file can be read in one direction alone: one thread takes batch after batch.
        chunks = npz.read_array(path, batch_size, target)
        return repeat(partial(next, chunks), -(-count // batch_size))

    return PixelSet(
        name=name,
        kind="npz",
        hash=digest,
        labels=[None] * count if labels is None else list(labels),
        classes=[] if labels is None else [str(i) for i in range(max(labels) + 1)],
        size=target,
        jpeg=0,
        resized=0 if target == (height, width) else count,
        _readers=readers,
        _threads=1,
    )


def ahead(tasks: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """The results of `tasks`, in order; as many as there are threads are worked on in advance."""
    pending: deque[Future[T]] = deque()
    # Decoding silences warnings, and threads that overlap would leave them silent for good.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(task))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
