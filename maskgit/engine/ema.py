"""The moving average of a model's weights: the weights that are validated and exported."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A copy of `module`, in eval mode, that follows it at `decay`.

    The decay warms up as (1 + t) / (10 + t), so that the first steps do not linger.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Follow `module` after its update number `step` (from 0); buffers are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(average, list(module.parameters()), 1 - decay)  # of all at once
        for own, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(theirs)
