"""Sampling against what the machine can do: the transformer in 8 steps, and the sampler's share.

The official ImageNet-256 shape has random weights: time does not depend on them. Work is what is
executed; what skipping work gains shows in the seconds, against the rows of the plain path.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import Function, in_turns, measure
from benchmarks.table import LIMITS, Row
from maskgit import MaskGIT, MaskGITConfig, decode, guided
from maskgit.common.device import pick_device, pick_dtype
from maskgit.fast import fast
from maskgit.model import SIZES

OFFICIAL = MaskGITConfig(1024, 1000, [16, 16], **SIZES["official"])
GUIDANCE = 2.0
COLUMNS = LIMITS


@torch.no_grad()
def run(full: bool = False) -> Iterator[Row]:
    """The rows of the table. full: the official shape at 16 and 64 too, which without matrix units
    takes long."""
    emoji = on_device(MaskGIT.from_pretrained("emoji"))
    for batch in 1, 4, 16, 64:
        yield against_the_machine("emoji", emoji, batch, repeats=5)
    for batch in 1, 16:
        yield from other_ways("emoji", emoji, batch, repeats=5)
    official = on_device(MaskGIT(OFFICIAL))
    more = (16, 64) if full or torch.cuda.is_available() else ()
    for batch in 1, 4, *more:
        yield against_the_machine("official", official, batch, repeats=3)
    yield from other_ways("official", official, 4 if more else 1, repeats=2)


def against_the_machine(name: str, model: MaskGIT, batch: int, repeats: int) -> Row:
    quick = fast(model)
    function = afresh(quick, sampled(quick, some_labels(model, batch), 0))
    return measure(f"{name}, batch {batch}, 8 steps", function, repeats)


def other_ways(name: str, model: MaskGIT, batch: int, repeats: int) -> Iterator[Row]:
    """Guidance, the sampler alone and the plain path, and how many times as long as the fast path
    without guidance each takes."""
    quick, labels = fast(model), some_labels(model, batch)
    kept = sampled(quick, labels, 0)
    usual = afresh(quick, kept)
    some = "interval:0.5-0.9"  # 4 of the 8
    ways = {
        "sampler alone": alone(model, labels),
        "guided": afresh(quick, sampled(quick, labels, GUIDANCE)),
        "guided at 4 of them": afresh(quick, sampled(quick, labels, GUIDANCE, some)),
        "plain path": sampled(model, labels, 0),
    }
    if next(model.parameters()).dtype != torch.float32:
        exact = MaskGIT(model.config).eval().to(labels.device)
        ways["plain path in fp32"] = sampled(exact, labels, 0)
    for way, function in ways.items():
        yield in_turns(f"{name}, batch {batch}, 8 steps, {way}", function, usual, repeats)
    kept()
    yield measure(f"{name}, batch {batch}, 8 steps, of classes drawn before", kept, repeats)


def on_device(model: MaskGIT) -> MaskGIT:
    device = pick_device("auto")
    return model.eval().to(device, pick_dtype("auto", device))


def sampled(model: Any, labels: Tensor, scale: float, schedule: str = "constant") -> Function:
    """Decoding in 8 steps, from masks alone."""
    config = model.config
    tokens = labels.new_full((len(labels), config.tokens), config.mask_id)
    function, seeds = guided(model, labels, scale, schedule), list(range(len(labels)))
    return lambda: decode(function, tokens, config.mask_id, steps=8, seeds=seeds)


def afresh(model: Any, function: Function) -> Function:
    """Let a fast model lose what it keeps each time, so that it computes what it does at first."""

    def call() -> Any:
        model.net.first, model.net.last = {}, None
        return function()

    return call


def some_labels(model: Any, batch: int) -> Tensor:
    """As many labels, all different where there are so many."""
    return torch.arange(batch, device=pick_device("auto")) % model.config.num_classes


def alone(model: MaskGIT, labels: Tensor) -> Function:
    """Decoding in 8 steps with logits that cost nothing."""
    config = model.config
    logits = torch.randn(len(labels), config.tokens, config.codebook_size, device=labels.device)
    tokens = labels.new_full((len(labels), config.tokens), config.mask_id)
    seeds = list(range(len(labels)))
    return lambda: decode(lambda tokens, r: logits, tokens, config.mask_id, steps=8, seeds=seeds)
