"""The linear layers of the fast path: several layers of one input as one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECE = 768  # outputs that are computed at a time, where weights lie by columns: more take longer


class Product:
    """What some linear layers of one input compute, one behind the other."""

    outputs: int  # of all layers together

    def __init__(self, *layers: nn.Linear) -> None:
        weight, self.bias = joined(*layers)
        self.weight, self.outputs = by_columns(weight), len(weight)
        pieces = 1 if self.weight is weight else -(-self.outputs // PIECE)
        self.piece = -(-self.outputs // pieces)

    def __call__(self, x: Tensor, buffer: Tensor | None = None) -> Tensor:
        """x (..., i) -> (..., o), which may lie in the buffer, flat and large enough for it."""
        if buffer is None:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        out = buffer[: len(rows) * self.outputs].view(len(rows), self.outputs)
        weights, places = self.weight.t().split(self.piece, 1), out.split(self.piece, 1)
        biases = [None] * len(places) if self.bias is None else self.bias.split(self.piece)
        for bias, weight, place in zip(biases, weights, places, strict=True):
            if bias is None:
                torch.mm(rows, weight, out=place)
            else:
                torch.addmm(bias, rows, weight, out=place)
        return out.view(*x.shape[:-1], self.outputs)


def joined(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight (o, i), and bias (o,) or None, of the one layer that computes what all of these do."""
    weights = [layer.weight.detach() for layer in layers]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    biased = layers[0].bias is not None
    return weight, torch.cat([layer.bias.detach() for layer in layers]) if biased else None


def by_columns(weight: Tensor) -> Tensor:
    """The same weight (o, i), on a processor and in fp32 laid out as products read it fastest."""
    fp32 = weight.is_cpu and weight.dtype == torch.float32
    return weight.t().contiguous().t() if fp32 else weight
