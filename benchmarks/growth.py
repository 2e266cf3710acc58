"""How cost grows: with the tokens of an image, with the steps, with the images of a batch.

`times` is the time by that of the line above. Products grow with the tokens, attention with their
square; steps after the first cost a pass each; a batch costs what its images do, once there are
enough of them to keep the machine busy.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from benchmarks.machine import Function, measure
from benchmarks.sampling import OFFICIAL, afresh, on_device, sampled, some_labels
from benchmarks.table import LIMITS, Row
from maskgit import MaskGIT, MaskGITConfig, decode
from maskgit.fast import fast
from maskgit.model import SIZES

COLUMNS = LIMITS
REPEATS = 3


@torch.no_grad()
def run(full: bool = False) -> Iterator[Row]:
    """The rows of the table. full: steps and batches of the official shape too."""
    yield from grown(tokens())
    shapes = {"emoji": MaskGIT.from_pretrained("emoji")}
    if full or torch.cuda.is_available():
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


def tokens() -> Iterator[Row]:
    """One pass of the official shape, over grids of 16, 32 and 64 tokens a side."""
    for side in 16, 32, 64:
        config = MaskGITConfig(1024, 1000, [side, side], **SIZES["official"])
        model = fast(on_device(MaskGIT(config)))
        labels = some_labels(model, 1)
        masks = labels.new_full((1, config.tokens), config.mask_id)
        masks[:, 0] = 0  # half-way, so to say: what an image of masks alone costs is kept
        one_pass = partial(model, masks, labels)
        yield measure(f"official, one pass, {side} x {side} tokens", one_pass, REPEATS)


def steps(name: str, model: MaskGIT) -> Iterator[Row]:
    quick = fast(model)
    labels = some_labels(model, 4)
    for count in 1, 2, 4, 8, 16, 32:
        function = afresh(quick, decoded(quick, labels, count))
        yield measure(f"{name}, batch 4, steps: {count}", function, REPEATS)


def decoded(model: MaskGIT, labels: torch.Tensor, count: int) -> Function:
    """Decoding in so many steps."""
    config, seeds = model.config, list(range(len(labels)))
    masks = labels.new_full((len(labels), config.tokens), config.mask_id)
    return lambda: decode(
        lambda tokens, r: model(tokens, labels), masks, config.mask_id, steps=count, seeds=seeds
    )


def batches(name: str, model: MaskGIT) -> Iterator[Row]:
    quick = fast(model)
    for batch in 1, 2, 4, 8, 16, 32, 64:
        function = afresh(quick, sampled(quick, some_labels(model, batch), 0))
        yield measure(f"{name}, 8 steps, batch: {batch}", function, REPEATS)
