"""The precision of what must not be computed in fewer bits than fp32."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x`, of any shape and type, in float32; float64 stays as it is.

    For logits, distances and norms: fp32 under a model in half precision, and nothing rounded
    on the way when a whole model computes in float64.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
