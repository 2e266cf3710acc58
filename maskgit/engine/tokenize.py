"""Makes token caches: shard by shard, by any number of processes, going on where one stopped.

A shard is a function of the cache's stamp and of its own number. It has its name only when it is
whole, and its hash in itself: so each process can tell which of its shards there are already.
"""

import logging
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from maskgit.common import RunError, UserError
from maskgit.common.folder import check_space, read_json, replacing, unfinished
from maskgit.common.processes import rank, world
from maskgit.common.progress import Advance, meter
from maskgit.common.signals import Interrupted, held
from maskgit.engine.config import differences
from maskgit.engine.data import CACHE_BYTES, ImageSet
from maskgit.engine.loader import Pairs, load
from maskgit.engine.tokens import (
    INDEX,
    Record,
    Stamp,
    TokenSet,
    index_of,
    open_tokens,
    pack,
    read_record,
    read_shard,
    stamp_of,
)

log = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [0, 1] -> tokens (B, h, w)
SHARD_IMAGES = 4096


def cached(
    folder: Path, stamp: Stamp, images: ImageSet, encode: Encode, device: torch.device
) -> TokenSet:
    """The tokens of a cache; where it is not there, the processes of a run make it together.

    Raises what `make_tokens` does, and RunError where another process did. After a signal to one of
    several processes, all leave together.
    """
    if world() == 1:
        make_tokens(folder, stamp, images, encode, device)
        return open_tokens(folder)[1]
    with held() as stop:
        with suppress(Interrupted), stop.ending():
            make_tokens(folder, stamp, images, encode, device, process=rank(), processes=world())
        status = torch.tensor(128 + stop[0] if stop else 0, device=device)
        try:
            dist.all_reduce(status, dist.ReduceOp.MAX)
        except RuntimeError:
            raise RunError(f"a process that was making {folder} has stopped: it says why") from None
        if status:
            raise SystemExit(int(status))
    return open_tokens(folder)[1]


def make_tokens(
    folder: Path,
    stamp: Stamp,
    images: ImageSet,
    encode: Encode,
    device: torch.device,
    batch_size: int = 64,
    process: int = 0,
    processes: int = 1,
) -> bool:
    """Write those shards that a cache lacks; of several processes each has its own share of them.

    Gives whether all are there now, and the index too: the process that finds it so writes it.
    Unusable images are left out, and named in it. Raises UserError for a folder that has tokens of
    another stamp, and when too many images are unusable.
    """
    check_stamp(folder, stamp)
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder, process, processes)
    views = _Views(images, stamp)
    names, missing, done = stamp.shards(), [], 0
    mine = range(process, len(names), processes)
    for k in mine:
        shard = read_shard(folder / names[k])
        if shard and stamp_of(shard[0]) == stamp:
            views.report(shard[0]["broken"])
            done += len(stamp.rows(k))
            continue
        if (folder / names[k]).exists():
            log.warning("%s is damaged: it is made anew", folder / names[k])
        missing.append(k)
    total = sum(len(stamp.rows(k)) for k in mine)
    if missing:
        lacking = sum(len(stamp.rows(k)) for k in missing)
        check_space(folder, stamp.nbytes * lacking // stamp.images, "the tokens take")
        with (
            meter(total, "tokenizing", "images", done=done) as advance,
            closing(_encoded(views, missing, encode, device, batch_size, advance)) as shards,
        ):
            for k, content in shards:
                _write(folder / names[k], content)
    return _finish(folder, stamp, images)


def check_stamp(folder: Path, stamp: Stamp) -> None:
    """Raise UserError for a folder that has tokens of another stamp, naming both."""
    found = None
    with suppress(UserError):  # no index yet, or a damaged one, which is written anew
        found = stamp_of(read_json(folder / INDEX))
    for path in sorted(folder.glob("tokens-*.safetensors")):
        found = found or stamp_of(read_record(path))
    if found and found != stamp:
        what = f"not of {stamp}"
        if (found.tokenizer, found.data) == (stamp.tokenizer, stamp.data):
            changed = "; ".join(differences(asdict(found), asdict(stamp)))
            what = f"made otherwise ({changed[:300]})"
        raise UserError(
            f"{folder} holds tokens of {found}, {what}: give another folder, or delete this one"
        )


class _Views(ImageSet):
    """The images of a set, each as it is and in random crops: image (1 + K, 3, H, W).

    Crop number k of an image is a function of (seed, its number, k).
    """

    def __init__(self, images: ImageSet, stamp: Stamp) -> None:
        config = replace(images.config, crop="random", mirror=False)
        super().__init__(images.items, images.classes, config, images.files)
        self.images, self.stamp = images, stamp
        self.broken = images.broken

    def get(self, index: int, draw: int | None = None, seed: int = 0) -> dict[str, Any]:
        view = super().get
        sample = view(index)
        if sample["index"] != index:
            return sample  # another image in its place, which is left out
        crops = [view(index, k, self.stamp.seed)["image"] for k in range(self.stamp.crops)]
        return sample | {"image": torch.stack([sample["image"], *crops])}

    def _pixels(self, index: int) -> np.ndarray:
        """Decoded once for all its crops, and not kept for longer."""
        if index not in self._kept:
            self._kept.clear()
            self._room = CACHE_BYTES
        return super()._pixels(index)

    def variants(self, batch: dict[str, Tensor], encode: Encode, device: torch.device) -> Tensor:
        """Tokens (B, V, N) of a batch of views: each view, and after it mirrored if the set is.

        An image that may not be mirrored has the same tokens again.
        """
        may = torch.tensor([self.images.may_mirror(i) for i in batch["index"].tolist()])
        found = []
        for view in batch["image"].unbind(1):
            pixels = view.to(device).float() / 255  # (B, 3, H, W)
            plain = encode(pixels).flatten(1).cpu()  # (B, N)
            found.append(plain)
            if self.stamp.mirror:
                found.append(plain.clone())
                if may.any():
                    found[-1][may] = encode(pixels[may.to(device)].flip(3)).flatten(1).cpu()
        return torch.stack(found, 1)

    def shard(self, k: int, parts: Sequence[tuple[Tensor, ...]]) -> bytes:
        """The file of shard k, of the tokens, labels and indices of its batches."""
        shape = (0, self.stamp.variants, int(np.prod(self.stamp.grid)))
        none = (torch.zeros(shape, dtype=torch.long), *[torch.zeros(0, dtype=torch.long)] * 2)
        tokens, labels, indices = map(torch.cat, zip(none, *parts, strict=True))
        left_out = sorted(set(self.stamp.rows(k)) - set(indices.tolist()))
        wheres = [self.items[i].where for i in left_out]
        record: Record = {
            "stamp": asdict(self.stamp),
            "shard": k,
            "images": len(indices),
            "broken": {where: self.broken[where] for where in wheres},
        }
        tensors = {"tokens": tokens.to(self.stamp.kind), "labels": labels, "indices": indices}
        return pack(record, tensors)


def _encoded(
    views: _Views,
    shards: list[int],
    encode: Encode,
    device: torch.device,
    batch_size: int,
    advance: Advance,
) -> Generator[tuple[int, bytes], None, None]:
    """Shards and their files, one after another: batches end with them, workers go on."""

    def plan() -> Iterator[Pairs]:
        for rows in map(views.stamp.rows, shards):
            for first in range(0, len(rows), batch_size):
                yield [(i, None) for i in rows[first : first + batch_size]]

    def shard_of(batch: dict[str, Tensor]) -> int:
        return int(batch["index"][0]) // views.stamp.shard_images

    empty = set(shards)  # if none of its images is usable, no batch is of a shard
    stream = load(views, plan(), 0, views.config.workers)
    with closing(stream):  # type: ignore[type-var]
        for k, batches in groupby(stream, shard_of):
            parts = []
            for batch in batches:
                tokens = views.variants(batch, encode, device)
                parts.append((tokens, batch["label"], batch["index"]))
                advance(len(tokens))
            empty.discard(k)
            yield k, views.shard(k, parts)
    for k in sorted(empty):
        yield k, views.shard(k, [])


def _write(path: Path, content: bytes) -> None:
    """Write a file that is whole, and on the disk, before it has its name.

    A disk that is full is an OSError that names the file.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _clean(folder: Path, process: int, processes: int) -> None:
    """Remove what processes that were killed left half-written of the shards that are now this
    one's, and of the index, which is the first one's."""
    for path in unfinished(folder):
        shard = re.match(r"\.tokens-(\d+)", path.name)
        if (int(shard[1]) if shard else 0) % processes == process:
            log.warning("removed %s, which a run that was killed had not completed", path)
            path.unlink(missing_ok=True)


def _finish(folder: Path, stamp: Stamp, images: ImageSet) -> bool:
    """Write the index if all shards are there."""
    records = [read_record(folder / name) for name in stamp.shards()]
    complete = [record for record in records if record and stamp_of(record) == stamp]
    if len(complete) < len(records):
        return False
    for record in complete:
        images.report(record["broken"])
    content, path = index_of(stamp, complete), folder / INDEX
    if not (path.is_file() and path.read_bytes() == content):
        with suppress(FileNotFoundError):  # the first process took it for a leftover: it begins
            _write(path, content)  # just now, and when it comes to its end it writes it
    return True
