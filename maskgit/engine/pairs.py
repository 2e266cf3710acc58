"""Batches of images, each with one of its captions."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from maskgit.common import noise
from maskgit.engine.captions import captions_of
from maskgit.engine.data import ImageSet

Batch = dict[str, Tensor]


class Pairs:
    """The captions of a set of images, which add to its batches `text` (B, L), the ids of one
    caption of each image, `caption` (B,), a number that is the same where the captions are, and
    `captions` (B, M), the numbers of all that the image has, filled up with -1."""

    def __init__(
        self, images: ImageSet, table: str | None, tokenize: Callable[[Sequence[str]], Tensor]
    ) -> None:
        """table: see `captions_of`; it may have those of other images, too, as of the held-out
        ones. tokenize: texts -> ids (B, L) int64."""
        self.captions = captions_of(images.items, table, surplus=True)
        self.most = max(len(own) for own in self.captions)  # M
        self.tokenize = tokenize

    def drawn(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """For training: of an image's captions one at random, by the sample's `seed` alone."""
        for batch in batches:
            draws = noise.uniform(batch["seed"], 0, 1, noise.CAPTION)[:, 0]  # (B,)
            yield self.join(batch, draws.tolist())

    def first(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """For validation: always the first caption."""
        for batch in batches:
            yield self.join(batch, [0.0] * len(batch["index"]))

    def join(self, batch: Batch, draws: Sequence[float]) -> Batch:
        """draws: for each image a number in [0, 1), which picks one of its captions."""
        several = [self.captions[index] for index in batch["index"].tolist()]
        texts = [own[int(draw * len(own))] for own, draw in zip(several, draws, strict=True)]
        rows = [[*map(number, own)] + [-1] * (self.most - len(own)) for own in several]
        return batch | {
            "text": self.tokenize(texts),  # (B, L)
            "caption": torch.tensor([number(text) for text in texts]),
            "captions": torch.tensor(rows),  # (B, M)
        }

    @property
    def fingerprint(self) -> str:
        """A hash of the captions of each image."""
        return hashlib.sha256(repr(self.captions).encode()).hexdigest()

    @property
    def texts(self) -> list[str]:
        """All captions, each once."""
        return list(dict.fromkeys(text for own in self.captions for text in own))


@lru_cache(2**16)
def number(text: str) -> int:
    """A hash of a text, from 0 to below 2^56."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
