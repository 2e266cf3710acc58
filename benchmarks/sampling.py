"""Sampling against what the machine can do: the transformer, the tokenizer, the sampler's share.

The official ImageNet-256 shape has random weights: time does not depend on them. Work is what is
executed; what skipping work gains shows in the seconds, against the rows of the plain path.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import startup
from benchmarks.machine import Function, all_convolutions, measure, product
from maskgit import MaskGIT, MaskGITConfig, decode, guided
from maskgit.common.device import pick_device, pick_dtype
from maskgit.evaluation.report import table
from maskgit.fast import Net, fast
from maskgit.model import SIZES
from vqgan import VQGAN, VQGANConfig

OFFICIAL = MaskGITConfig(1024, 1000, [16, 16], **SIZES["official"])
GUIDANCE = 2.0
BATCHES, MORE = (1, 4), (16, 64)  # of the official shape; MORE with --full
REPEATS = 3
COLUMNS = ("what", "GFLOP", "s", "spread", "GFLOP/s", "limit", "ratio", "by processor", "MB")


@torch.no_grad()
def run(full: bool = False) -> list[dict[str, Any]]:
    """The rows of the table."""
    rows = [row for part in (machine, official, emoji, tokenizer) for row in part(full)]
    rows += startup.run()
    show(rows)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table; the spread is that between the quickest and the slowest repeat."""
    table(COLUMNS, [tuple(cells(row)) for row in rows])


def cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["what"]
    yield f"{row['flops'] / 1e9:.4g}" if row.get("flops") else "-"
    yield f"{row['median']:.4g}"
    yield f"{max(row['seconds']) - min(row['seconds']):.2g}"
    for name in "rate", "limit":
        yield f"{row[name] / 1e9:.0f}" if name in row else "-"
    for name in "ratio", "ratio_processor":
        yield f"{row[name]:.2f}" if name in row else "-"
    yield f"{row['memory']:.0f}" if "memory" in row else "-"


def on_device(model: MaskGIT) -> MaskGIT:
    device = pick_device("auto")
    return model.eval().to(device, pick_dtype("auto", device))


def sampled(model: Any, labels: Tensor, scale: float) -> Function:
    """Decoding in 8 steps, from masks alone."""
    config = model.config
    tokens = labels.new_full((len(labels), config.tokens), config.mask_id)
    function, seeds = guided(model, labels, scale), list(range(len(labels)))
    return lambda: decode(function, tokens, config.mask_id, steps=8, seeds=seeds)


def forget(model: Any) -> None:
    """Let a fast model lose what it keeps, so that each repeat computes what the first one does."""
    if isinstance(model.net, Net):
        model.net.first, model.net.last = {}, None


def some_labels(model: Any, batch: int) -> Tensor:
    """As many labels, all different where there are so many."""
    return torch.arange(batch, device=pick_device("auto")) % model.config.num_classes


def machine(full: bool) -> Iterator[dict[str, Any]]:
    """The products of the official shape alone."""
    width, hidden = OFFICIAL.width, OFFICIAL.hidden
    for dtype in torch.float32, torch.bfloat16:
        for batch in BATCHES:
            for inner, outer in ((width, 3 * width), (width, width), (hidden, width)):
                sizes = 257 * batch, inner, outer
                what = f"product {' x '.join(map(str, sizes))}, {str(dtype)[6:]}"
                function = product(*sizes, dtype, pick_device("auto"))
                yield measure(what, function, REPEATS + 2)


def official(full: bool) -> Iterator[dict[str, Any]]:
    """The transformer of the official shape: 8 steps, with and without guidance."""
    model = on_device(MaskGIT(OFFICIAL))
    quick = fast(model)
    for batch in BATCHES + MORE * full:
        labels = some_labels(model, batch)
        take = partial(measure, repeats=REPEATS, before=partial(forget, quick))
        yield take(f"official, 8 steps, batch {batch}", sampled(quick, labels, 0))
        if batch == 1 or full:
            yield take(
                f"official, 8 steps, guided, batch {batch}", sampled(quick, labels, GUIDANCE)
            )
            yield take(f"official, 8 steps, plain path, batch {batch}", sampled(model, labels, 0))
        what = f"official, 8 steps, sampler alone, batch {batch}"
        yield measure(what, alone(model, labels), REPEATS, limit=None)


def alone(model: MaskGIT, labels: Tensor) -> Function:
    """Decoding in 8 steps with logits that cost nothing."""
    config = model.config
    logits = torch.randn(len(labels), config.tokens, config.codebook_size, device=labels.device)
    tokens = labels.new_full((len(labels), config.tokens), config.mask_id)
    seeds = list(range(len(labels)))
    return lambda: decode(lambda tokens, r: logits, tokens, config.mask_id, steps=8, seeds=seeds)


def emoji(full: bool) -> Iterator[dict[str, Any]]:
    """The bundled model's transformer."""
    model = on_device(MaskGIT.from_pretrained("emoji"))
    quick = fast(model)
    for batch in (1, 16, *([64] * full)):
        labels = some_labels(model, batch)
        take = partial(measure, repeats=3 * REPEATS, before=partial(forget, quick))
        for name, scale in ("", 0.0), (", guided", GUIDANCE):
            what = f"emoji, 8 steps{name}"
            yield take(f"{what}, batch {batch}", sampled(quick, labels, scale))
            yield take(f"{what}, plain path, batch {batch}", sampled(model, labels, scale))
        take = partial(measure, repeats=3 * REPEATS, limit=None)
        yield take(f"emoji, 8 steps, sampler alone, batch {batch}", alone(model, labels))
        again = sampled(quick, labels, 0)
        again()
        yield take(f"emoji, 8 steps, of classes drawn before, batch {batch}", again)


def tokenizer(full: bool) -> Iterator[dict[str, Any]]:
    """Tokens to images and back: MaskGIT's tokenizer at 256 pixels, and the bundled one."""
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    both = {"tokenizer at 256": VQGAN(VQGANConfig()), "emoji": VQGAN.from_pretrained("emoji")}
    for name, vqgan in both.items():
        sides = {"tokenizer at 256": 16, "emoji": 8}
        vqgan.eval().to(device, dtype).quantizer.float()
        for batch in (1, *BATCHES[1:] * full, *MORE[:1] * (name == "emoji")):
            size = batch, sides[name], sides[name]
            tokens = torch.randint(vqgan.config.codebook_size, size, device=device)
            images = vqgan.decode(tokens)
            take = partial(measure, repeats=REPEATS, limit=all_convolutions)
            yield take(f"{name}, decoding, batch {batch}", partial(vqgan.decode, tokens))
            yield take(f"{name}, tokenizing, batch {batch}", partial(vqgan.encode, images))
