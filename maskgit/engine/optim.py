"""What optimizers and learning-rate schedules have in common over all tasks."""

import math
from typing import Any

from torch import Tensor, nn


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices, kernels and embeddings decay; biases, gains of norms
    and what else has one axis do not. Frozen parameters are in neither."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def clipped(gradients: list[Tensor], scale: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """The norm that gradients have when multiplied by `scale`, and what to multiply them by
    instead, so that their norm is at most `most`. Without waiting for the device."""
    norm = nn.utils.get_total_norm(gradients)
    scale = scale.to(norm.dtype)
    norm = norm * scale
    return norm, scale * (most / (norm + 1e-6)).clamp(max=1.0)


def warmup_cosine(step: int, warmup: int, steps: int, final: float = 0.0) -> float:
    """The learning rate's factor at `step`: it rises linearly over `warmup` steps (the first step
    has 1 / warmup), then falls along half a cosine to `final` at step `steps`, and stays there."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
