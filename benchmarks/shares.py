"""What each part of the fast path gains: sampling with all of them, and with all but one.

All are measured in turns. A share is the time without the part by that with it, the median over
the turns; above 1 it gains. The parts are left out here: the fast path has no switches.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import Function, timed
from benchmarks.sampling import GUIDANCE, OFFICIAL, afresh, on_device, sampled, some_labels
from benchmarks.table import TIMES, Row, number
from maskgit import MaskGIT
from maskgit.fast import Fused, Net, fast, take
from maskgit.products import Product

TURNS = 7
ALL, PLAIN = "all parts", "none: the plain path"
COLUMNS = {**TIMES, "share": number("share", form=".3f")}


def run(full: bool = False) -> Iterator[Row]:
    """Rows for the bundled model, 16 images of 4 classes, guided, and for the official shape, 4
    images of 4 classes. full: all steps of that too."""
    emoji, official, count = MaskGIT.from_pretrained("emoji"), MaskGIT(OFFICIAL), 8 if full else 2
    yield from shares("emoji, batch 16, guided", emoji, 16, GUIDANCE)
    yield from shares(f"official, batch 4, {count} steps", official, 4, 0, count)


@torch.no_grad()
def shares(
    name: str, model: MaskGIT, batch: int, scale: float, steps: int = 8, turns: int = TURNS
) -> Iterator[Row]:
    """A row for all parts, for each one left out, and for none; images of 4 classes."""
    model = on_device(model)
    quick = fast(model)
    labels = some_labels(model, 4).repeat_interleave(batch // 4)
    with_fast = afresh(quick, sampled(quick, labels, scale, steps=steps))
    plain = sampled(model, labels, scale, steps=steps)
    with patch("maskgit.products.by_columns", lambda weight: weight):
        by_rows = fast(model)
    variants: dict[str, tuple[Function, Callable[[], Any]]]
    variants = {ALL: (with_fast, nullcontext), PLAIN: (plain, nullcontext)}
    variants |= {f"without: {what}": (with_fast, left_out) for what, left_out in PARTS.items()}
    rows = afresh(by_rows, sampled(by_rows, labels, scale, steps=steps))
    variants["without: weights by columns, and pieces"] = rows, nullcontext
    seconds: dict[str, list[float]] = {what: [] for what in variants}
    for turn in range(turns + 1):
        for what, (function, left_out) in variants.items():
            with left_out():
                taken = timed(function)
            if turn:  # the first one warms up
                seconds[what].append(taken)
    for what, own in seconds.items():
        pairs = zip(own, seconds[ALL], strict=True)
        yield {
            "what": f"{name}, {what}",
            "seconds": own,
            "median": statistics.median(own),
            "share": statistics.median(without / all_parts for without, all_parts in pairs),
        }


def apart(fused: Fused, x: Tensor, at: Tensor | None, buffer: Tensor) -> tuple[Tensor, ...]:
    """A product each for queries, keys and values."""
    asked, tell = [] if fused.ask is None else [fused.ask(take(x, at))], fused.tell
    parts = 3 - len(asked)
    biases = [None] * parts if tell.bias is None else tell.bias.chunk(parts)
    return *asked, *map(F.linear, [x] * parts, tell.weight.chunk(parts), biases)


def no_buffer(product: Product, x: Tensor, buffer: Tensor | None = None) -> Tensor:
    return F.linear(x, product.weight, product.bias)


PARTS = {
    "one product for q, k and v": lambda: patch.object(Fused, "project", apart),
    "wide results in one buffer": lambda: patch.object(Product, "__call__", no_buffer),
    "modulations once": lambda: patch.object(Net, "known", lambda net, x: net.condition(x)),
    "masks alone once a class": lambda: patch.object(Net, "of_masks", of_masks_each),
    "answers only where asked": lambda: patch("maskgit.fast.places", lambda masked: None),
    "parts that fit the cache": lambda: patch("maskgit.fast.CACHE", 2**60),
    "threads with parts of their own": lambda: patch("maskgit.fast.ENOUGH", 2**60),
    "wide results in pieces": lambda: patch.object(
        Product, "piece", property(lambda product: product.outputs), create=True
    ),
}


def of_masks_each(net: Net, tokens: Tensor, labels: Tensor) -> Tensor:
    """Masks alone, computed for each image."""
    return net.in_parts(tokens, net.known(labels), None)
