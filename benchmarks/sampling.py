"""Sampling against what the machine can do: the transformer in 8 steps, and the sampler's share.

The official ImageNet-256 shape has random weights: time does not depend on them. Work is what is
executed; what skipping work gains shows in the seconds, against the rows of the plain path.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import Function, cuda, measure
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
    """The rows of the table. full: all of the official shape also where it takes long, which is
    where there are no matrix units."""
    emoji = on_device(MaskGIT.from_pretrained("emoji"))
    for batch in 1, 4, 16, 64:
        yield from unguided_and_guided("emoji", emoji, batch)
    for batch in 1, 16:
        yield from other_ways("emoji", emoji, batch)
    official = on_device(MaskGIT(OFFICIAL))
    whole = full or cuda() or next(official.parameters()).dtype != torch.float32
    for batch in (1, 4, 16, *((64,) if whole else ()), *((256,) if cuda() else ())):
        yield from unguided_and_guided("official", official, batch, whole or batch == 1)
    yield from other_ways("official", official, 4 if whole else 1)
    if cuda():
        yield one_compiled("official", official)


def unguided_and_guided(name: str, model: MaskGIT, batch: int, both: bool = True) -> Iterator[Row]:
    """Rows for sampling without guidance and, where `both` are wanted, with it."""
    quick, labels = fast(model), some_labels(model, batch)
    usual = afresh(quick, sampled(quick, labels))
    yield measure(f"{name}, batch {batch}, 8 steps", usual)
    if both:
        function = afresh(quick, sampled(quick, labels, GUIDANCE))
        yield measure(f"{name}, batch {batch}, 8 steps, guided", function, against=usual)


def other_ways(name: str, model: MaskGIT, batch: int) -> Iterator[Row]:
    """The sampler alone, one pass, guidance at some steps, the plain path, and what is kept."""
    quick, labels = fast(model), some_labels(model, batch)
    kept = sampled(quick, labels)
    usual = afresh(quick, kept)
    some = sampled(quick, labels, GUIDANCE, "interval:0.5-0.9")
    half = torch.arange(model.config.tokens, device=labels.device) % 2 * model.config.mask_id
    what = f"{name}, batch {batch}"
    yield measure(f"{what}, one pass", partial(quick, half.expand(batch, -1), labels))
    ways = {"guided at 4 of them": afresh(quick, some), "plain path": sampled(model, labels)}
    if next(model.parameters()).dtype != torch.float32:
        ways["plain path in fp32"] = sampled(MaskGIT(model.config).eval().to(labels.device), labels)
    for way, function in ways.items():
        yield measure(f"{what}, 8 steps, {way}", function, against=usual)
    sampler = alone(model, labels)
    yield measure(f"{what}, 8 steps, sampler alone", sampler, limit=None, against=usual)
    kept()
    yield measure(f"{what}, 8 steps, of classes drawn before", kept, against=usual)


def one_compiled(name: str, model: MaskGIT) -> Row:
    """One image, its passes launched as CUDA graphs: on a GPU, to launch each operation takes
    longer than to compute it. Compiles the model itself."""
    labels = some_labels(model, 1)
    quick = fast(model)
    usual = afresh(quick, sampled(quick, labels))
    model.compile(mode="reduce-overhead")
    function = sampled(model, labels)
    function()
    what = f"{name}, batch 1, 8 steps, compiled, CUDA graphs"
    return measure(what, function, against=usual, compiled=True)


def on_device(model: MaskGIT) -> MaskGIT:
    device = pick_device("auto")
    return model.eval().to(device, pick_dtype("auto", device))


def sampled(
    model: Any, labels: Tensor, scale: float = 0, schedule: str = "constant", steps: int = 8
) -> Function:
    """Decoding from masks alone."""
    config = model.config
    tokens = labels.new_full((len(labels), config.tokens), config.mask_id)
    function, seeds = guided(model, labels, scale, schedule), list(range(len(labels)))
    return lambda: decode(function, tokens, config.mask_id, steps=steps, seeds=seeds)


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
