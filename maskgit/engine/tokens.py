"""Token caches: the images of a set as tokens, encoded once, for the transformer to learn from.

A cache is a folder. `tokens-00000.safetensors` and so on hold a stretch of the set each, in its
order; `index.json` lists them, and is written when all of them are there (by `tokenize.py`).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from maskgit.common import UserError, noise
from maskgit.common.folder import FORMAT_VERSION, build_config, read_json
from maskgit.engine.data import share_of
from maskgit.engine.order import Order, sample_seeds

INDEX = "index.json"
TENSORS = ("tokens", "labels", "indices")  # of a shard of m images: (m, V, N), (m,), (m,)
Record = dict[str, Any]  # what a shard says of itself: stamp, images, broken, sha256


@dataclass(frozen=True)
class Stamp:
    """What tokens depend on: those of equal stamps are the same. The two names are for people."""

    tokenizer: str  # SHA-256 of its weights
    data: str  # the fingerprint of the image set
    images: int  # of the set, usable or not
    size: list[int]  # height, width in pixels
    mirror: bool
    no_mirror: list[str]
    crops: int  # random ones of each image, beside the one in the middle
    seed: int  # of these crops
    dtype: str
    codebook_size: int
    grid: list[int]
    classes: list[str]
    shard_images: int
    tokenizer_name: str = field(compare=False)
    data_path: str = field(compare=False)

    def __str__(self) -> str:
        tokenizer = f"tokenizer {self.tokenizer_name} (sha256 {self.tokenizer[:12]})"
        return f"{tokenizer} and data {self.data_path} (sha256 {self.data[:12]})"

    @property
    def variants(self) -> int:
        """V: each image as it is and each of its crops, all of them mirrored too."""
        return (1 + self.crops) * (1 + self.mirror)

    @property
    def kind(self) -> torch.dtype:
        """Of the tokens on disk."""
        return torch.uint16 if self.codebook_size <= 2**16 else torch.uint32

    @property
    def nbytes(self) -> int:
        """What the tokens take on disk."""
        return self.images * self.variants * math.prod(self.grid) * self.kind.itemsize

    def shards(self) -> list[str]:
        """The names of the shards."""
        number = math.ceil(self.images / self.shard_images)
        return [f"tokens-{k:05}.safetensors" for k in range(number)]

    def rows(self, shard: int) -> range:
        """The images of a shard, by their numbers in the set."""
        first = shard * self.shard_images
        return range(first, min(first + self.shard_images, self.images))


class TokenSet:
    """M images as tokens, each in V variants, of which the first is the image as it is.

    shards: tokens (m, V, N) of any integer type, mostly mapped from files. labels, indices: int64
    (M,), the class of each image, and its number in the set that it comes from.
    """

    def __init__(self, shards: Sequence[Tensor], labels: Tensor, indices: Tensor) -> None:
        self.shards = [shard.numpy() for shard in shards]
        self.ends = np.cumsum([len(shard) for shard in shards])
        self.variants = self.shards[0].shape[1]
        self.label_of, self.index_of = labels, indices
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def commonest(self) -> float:
        """The share of the code that occurs most, in the images of the first shard as they are."""
        codes = self.shards[0][:, 0].ravel()
        return float(np.bincount(codes).max() / len(codes))

    def take(self, rows: list[int], variants: list[int]) -> dict[str, Tensor]:
        """A batch: tokens int64 (B, N), label and index int64 (B,)."""
        places = np.searchsorted(self.ends, rows, side="right")
        found = [
            self.shards[k][row - self.ends[k], v]  # counted from the shard's end, so below 0
            for k, row, v in zip(places, rows, variants, strict=True)
        ]
        tokens = torch.from_numpy(np.stack(found).astype(np.int64))  # (B, N)
        return {"tokens": tokens, "label": self.label_of[rows], "index": self.index_of[rows]}


def token_batches(
    images: TokenSet,
    batch_size: int,
    *,
    seed: int = 0,
    start_step: int = 0,
    balanced: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Endless training batches of one process: tokens int64 (B, N), label, index and seed (B,).

    Processes share a step's `batch_size` as those of `data.batches` do. The seed of a sample says
    which variant of its image it is.
    """
    order, share = Order(images.labels, seed, balanced), share_of(batch_size, world_size)
    for step in count(start_step):
        first = step * batch_size + rank * share
        draws = range(first, first + share)
        seeds = sample_seeds(seed, draws)  # (B,)
        drawn = noise.uniform(seeds, 0, 1, noise.VARIANT)[:, 0].double()
        variants = (drawn * images.variants).long()
        yield {**images.take([order(draw) for draw in draws], variants.tolist()), "seed": seeds}


def fixed_batches(images: TokenSet, batch_size: int, most: int) -> Iterator[dict[str, Tensor]]:
    """`most` images spread evenly over the set, as they are, in the same order at each call."""
    chosen = [i * len(images) // min(most, len(images)) for i in range(min(most, len(images)))]
    for start in range(0, len(chosen), batch_size):
        rows = chosen[start : start + batch_size]
        yield images.take(rows, [0] * len(rows))


def is_cache(folder: Path) -> bool:
    """Whether there are tokens in a folder, or in folders of it."""
    return any(folder.glob("tokens-*.safetensors")) or any(folder.glob("*/tokens-*.safetensors"))


def open_tokens(folder: Path) -> tuple[Stamp, TokenSet]:
    """What a cache holds; tokens stay in their files until they are asked for.

    Raises UserError for a folder that is no complete cache, and for a damaged shard, by its name.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} is no complete token cache: run its maskgit tokenize again")
    index = read_json(folder / INDEX)
    stamp = stamp_of(index)
    if stamp is None or index.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder / INDEX} is damaged or of another format: tokenize again")
    found = []
    for entry in index["shards"]:
        shard = read_shard(folder / entry["file"])
        if shard is None or shard[0]["sha256"] != entry["sha256"]:
            raise UserError(
                f"{folder / entry['file']} is missing or damaged, it has not the SHA-256 that "
                f"{INDEX} says: run its maskgit tokenize again, which makes this shard anew"
            )
        found.append(shard[1])
    tokens, labels, indices = ([tensors[name] for tensors in found] for name in TENSORS)
    return stamp, TokenSet(tokens, torch.cat(labels), torch.cat(indices))


def stamp_of(record: Any) -> Stamp | None:
    """The stamp in an index or in a shard's record; None where there is none to be understood."""
    try:
        return build_config(Stamp, record["stamp"], INDEX)
    except (UserError, KeyError, TypeError):
        return None


def pack(record: Record, tensors: dict[str, Tensor]) -> bytes:
    """A shard's file. Its hash, of all that it says, goes into its record as "sha256"."""
    record = {**record, "sha256": _digest(record, tensors)}
    # As one entry: the library writes several in any order.
    return save(tensors, {"tokens": json.dumps(record)})


def read_record(path: Path) -> Record | None:
    """What a shard says of itself, unchecked; None if it is missing, or no shard."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["tokens"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def read_shard(path: Path) -> tuple[Record, dict[str, Tensor]] | None:
    """A shard's record and tensors, mapped from the file; None if it is missing or damaged."""
    record = read_record(path)
    if record is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except SafetensorError:
        return None
    known = {name: value for name, value in record.items() if name != "sha256"}
    return (record, tensors) if record.get("sha256") == _digest(known, tensors) else None


def _digest(record: Record, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in TENSORS:
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def index_of(stamp: Stamp, records: list[Record]) -> bytes:
    """The content of `index.json`, from the records of all shards."""
    listed = [
        {"file": name, "images": record["images"], "sha256": record["sha256"]}
        for name, record in zip(stamp.shards(), records, strict=True)
    ]
    broken = {path: why for record in records for path, why in record["broken"].items()}
    index = {"format_version": FORMAT_VERSION, "stamp": asdict(stamp)}
    index |= {"shards": listed, "broken": broken}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
