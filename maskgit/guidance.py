"""Classifier-free guidance (Ho & Salimans 2022), as a wrapper around the model.

The one convention here: logits = cond + scale (cond - uncond), so that scale 0 is the model as it
is. A guidance schedule shapes the scale along the progress r of decoding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskgit.common import UserError, pick

# The share of the scale at progress r. Numbers after a colon are arguments: `interval:0.3-0.8`.
GUIDANCE: dict[str, Callable[..., float]] = {
    "constant": lambda r: 1.0,
    "linear": lambda r: r,
    # Weber et al. 2024 (MaskBit): late and steep
    "power-cosine": lambda r, power=3.0: (1 - math.cos(math.pi * r**power)) / 2,
    # Kynkäänniemi et al. 2024: neither at the start nor at the end
    "interval": lambda r, low=0.25, high=0.75: float(low <= r <= high),
}


def guidance_shape(schedule: str) -> Callable[[float], float]:
    """`linear`, `power-cosine:2`, `interval:0.3-0.8` -> the share of the scale as a function of r.

    Raises UserError for an unknown name or arguments that do not fit it.
    """
    name, _, text = schedule.partition(":")
    shape = pick(GUIDANCE, name, "guidance schedule")
    try:
        numbers = [float(number) for number in text.split("-")] if text else []
        shape(0.5, *numbers)
        if name == "interval" and numbers and numbers != sorted(numbers):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"guidance schedule {schedule!r}: numbers that do not fit; "
            "write for example power-cosine:3 or interval:0.25-0.75"
        ) from None
    return lambda r: shape(r, *numbers)


def guided(
    model: Any,
    labels: Tensor | None,
    scale: float = 0.0,
    schedule: str = "constant",
) -> Callable[[Tensor, float], Tensor]:
    """The callable for `decode`: (tokens (B, N), r) -> guided logits (B, N, K).

    model: a MaskGIT, or whatever maps (tokens, labels) to logits and has `config.null_label`.
    labels: int64 (B,), or None for images of no class, which there is nothing to guide to.
    schedule: a name in GUIDANCE, with arguments if need be, as `guidance_shape` reads it.

    With and without their labels the images go through the model as one batch of 2B. Where the
    scale is 0 at this r, only the B with their labels do.

    Raises UserError for a scale other than 0 when the model has no null label, or a scale that is
    no finite number.
    """

    def plain(tokens: Tensor, r: float) -> Tensor:
        return model(tokens, labels)

    shape = guidance_shape(schedule)
    if not math.isfinite(scale):
        raise UserError(f"guidance is {scale}, but must be a finite number")
    if scale == 0:
        return plain
    null = model.config.null_label
    if null is None:
        raise UserError(
            f"guidance {scale:g} needs a model trained with classes and label dropout, which this "
            "one was not: use guidance 0"
        )
    if labels is None:
        return plain
    both = torch.cat([labels, torch.full_like(labels, null)])  # (2B,)

    def tokens_to_logits(tokens: Tensor, r: float) -> Tensor:
        weight = scale * shape(r)
        if weight == 0:
            return plain(tokens, r)
        cond, uncond = model(torch.cat([tokens, tokens]), both).chunk(2)  # (B, N, K) each
        return cond + weight * (cond - uncond)

    return tokens_to_logits
