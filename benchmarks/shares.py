"""What each part of the fast path gains: sampling with all of them, and with all but one.

All are measured in turns. A share is the processor time without the part by that with it, the
median over the turns; above 1 it gains. The parts are left out here: the fast path has no switches.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import Function, timed
from benchmarks.sampling import GUIDANCE, OFFICIAL, forget, on_device, sampled
from maskgit import MaskGIT
from maskgit.evaluation.report import table
from maskgit.fast import FastModern, FastOfficial, Fused, Net, fast, take

TURNS = 5
ALL, PLAIN = "all parts", "none: the plain path"


def run(full: bool = False) -> list[dict[str, Any]]:
    """Rows for the bundled model, 16 images of 4 classes, guided, and for the official shape."""
    rows = list(shares("emoji, batch 16", MaskGIT.from_pretrained("emoji"), 16, GUIDANCE, TURNS))
    for batch in (1, *([4] * full)):
        rows += shares(f"official, batch {batch}", MaskGIT(OFFICIAL), batch, 0, TURNS - 2)
    shown = [(row["what"], f"{row['median']:.4g}", f"{row['share']:.3f}") for row in rows]
    table(("what", "s", "share"), shown)
    return rows


@torch.no_grad()
def shares(
    name: str, model: MaskGIT, batch: int, scale: float, turns: int
) -> Iterator[dict[str, Any]]:
    """A row for all parts, for each one left out, and for none."""
    model = on_device(model)
    quick = fast(model)
    labels = torch.arange(batch, device=next(model.parameters()).device) // 4
    with_fast, plain = sampled(quick, labels, scale), sampled(model, labels, scale)
    variants: dict[str, tuple[Function, Callable[[], AbstractContextManager[Any]]]]
    variants = {ALL: (with_fast, nullcontext), PLAIN: (plain, nullcontext)}
    variants |= {f"without: {what}": (with_fast, left_out) for what, left_out in PARTS.items()}
    clocks: dict[str, list[Any]] = {what: [] for what in variants}
    for turn in range(turns + 1):
        for what, (function, left_out) in variants.items():
            forget(quick)
            with left_out():
                clock = timed(function)
            if turn:  # the first one warms up
                clocks[what].append(clock)
    for what, own in clocks.items():
        pairs = zip(own, clocks[ALL], strict=True)
        seconds = [clock.wall for clock in own]
        yield {
            "what": f"{name}, {what}",
            "seconds": seconds,
            "median": statistics.median(seconds),
            "processor_seconds": [clock.processor for clock in own],
            "share": statistics.median(a.processor / b.processor for a, b in pairs),
        }


def apart(fused: Fused, x: Tensor, at: Tensor | None) -> tuple[Tensor, ...]:
    """A product each for queries, keys and values."""
    biases = [None] * 3 if fused.bias is None else fused.bias.chunk(3)
    return tuple(map(F.linear, (take(x, at), x, x), fused.weight.chunk(3), biases))


def plain_feed() -> AbstractContextManager[Any]:
    """The feed-forward layers as the model has them."""
    modern = patch.object(FastModern, "feed", lambda net, block, weight, x, inner: block.mlp(x))
    official = patch.object(
        FastOfficial,
        "feed",
        lambda net, block, x, inner: block.down(F.gelu(block.up(x), approximate="tanh")),
    )
    stack = ExitStack()
    stack.enter_context(modern)
    stack.enter_context(official)
    return stack


PARTS = {
    "one product for q, k and v": lambda: patch.object(Fused, "project", apart),
    "feed-forward in one buffer": plain_feed,
    "modulations once": lambda: patch.object(Net, "known", lambda net, x: net.condition(x)),
    "masks alone once a class": lambda: patch.object(Net, "of_masks", of_masks_each),
    "answers only where asked": lambda: patch("maskgit.fast.places", lambda masked: None),
    "parts that fit the cache": lambda: patch("maskgit.fast.CACHE", 2**60),
}


def of_masks_each(net: Net, tokens: Tensor, labels: Tensor) -> Tensor:
    """Masks alone, computed for each image."""
    return net.in_parts(tokens, net.known(labels), None)
