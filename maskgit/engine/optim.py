"""What optimizers and learning-rate schedules have in common over all tasks."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices, kernels and embeddings decay; biases, gains of norms
    and what else has one axis do not. Frozen parameters are in neither."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def rescale(gradients: list[Tensor], scale: Tensor, most: float) -> Tensor:
    """Multiply gradients by `scale`, and by less where their norm would then be above `most`;
    returns that norm. In place, and without waiting for the device."""
    norm = nn.utils.get_total_norm(gradients)
    scale = scale.to(norm.dtype)
    norm = norm * scale
    torch._foreach_mul_(gradients, scale * (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def warmup_cosine(step: int, warmup: int, steps: int, final: float = 0.0) -> float:
    """The learning rate's factor at `step`: it rises linearly over `warmup` steps (the first step
    has 1 / warmup), then falls along half a cosine to `final` at step `steps`, and stays there."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
