"""How cost grows: with the tokens of an image, with the steps, with the images of a batch.

`times` is the time by that of the line above. Products grow with the tokens, attention with their
square; steps after the first cost a pass each; a batch costs what its images do, once there are
enough of them to keep the machine busy.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from benchmarks.machine import cuda, measure
from benchmarks.sampling import OFFICIAL, afresh, on_device, sampled, some_labels
from benchmarks.table import LIMITS, Row
from maskgit import MaskGIT, MaskGITConfig
from maskgit.fast import fast
from maskgit.model import SIZES

COLUMNS = LIMITS


@torch.no_grad()
def run(full: bool = False) -> Iterator[Row]:
    """The rows of the table. full: steps and batches of the official shape too."""
    yield from grown(tokens())
    shapes = {"emoji": MaskGIT.from_pretrained("emoji")}
    if full or cuda():
        shapes["official"] = MaskGIT(OFFICIAL)
    for name, model in shapes.items():
        yield from grown(steps(name, on_device(model)))
        yield from grown(batches(name, on_device(model)))


def grown(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, and of each how many times the time of the one before it took."""
    before = None
    for row in rows:
        yield row | ({"times": row["median"] / before} if before else {})
        before = row["median"]


def tokens(size: str = "official") -> Iterator[Row]:
    """One pass of a size of transformers, over grids of 16, 32 and 64 tokens a side."""
    for side in 16, 32, 64:
        config = MaskGITConfig(1024, 1000, [side, side], **SIZES[size])
        model = fast(on_device(MaskGIT(config)))
        labels = some_labels(model, 1)
        masks = labels.new_full((1, config.tokens), config.mask_id)
        masks[:, 0] = 0  # what masks alone cost is kept
        one_pass = partial(model, masks, labels)
        yield measure(f"{size}, one pass, {side} x {side} tokens", one_pass)


def steps(name: str, model: MaskGIT) -> Iterator[Row]:
    quick = fast(model)
    labels = some_labels(model, 4)
    for count in 1, 2, 4, 8, 16, 32:
        function = afresh(quick, sampled(quick, labels, steps=count))
        yield measure(f"{name}, batch 4, steps: {count}", function)


def batches(name: str, model: MaskGIT) -> Iterator[Row]:
    quick = fast(model)
    for batch in 1, 2, 4, 8, 16, 32, 64:
        function = afresh(quick, sampled(quick, some_labels(model, batch)))
        yield measure(f"{name}, 8 steps, batch: {batch}", function)
