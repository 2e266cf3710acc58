"""Matrix products in int8, on a processor: fewer bits, and so more of them at a time.

Weights are rounded once, with a scale for each output; what they are multiplied with at each call,
with a scale for each row. So no row's result depends on the others, and a seed still names an image
whatever the batch: it is another one than in fp32.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from maskgit.common import UserError
from maskgit.products import Product, joined

# Without instructions made for it (VNNI), a processor adds pairs of products in 16 bits, where two
# of 8 bits may overflow without a word. With 7 bits for the weights they cannot: 2 * 255 * 64 is
# below 2 ** 15. A weight has its own scale for each output, and can spare a bit sooner.
WEIGHT, LARGEST, ZERO = 64, 127, 128


class Int8Product(Product):
    """The same in int8. Its results lie in no buffer."""

    def __init__(self, *layers: nn.Linear) -> None:
        weight, bias = joined(*layers)
        self.outputs, self.linear = len(weight), int8_linear(weight, bias)

    def __call__(self, x: Tensor, buffer: Tensor | None = None) -> Tensor:
        return self.linear(x)


def check_int8(device: torch.device) -> None:
    """UserError where products in int8 cannot be had."""
    if device.type != "cpu":
        raise UserError(f"dtype int8 is for processors, not for {device.type}: take bf16 there")
    if not torch.backends.mkldnn.is_available():
        raise UserError("dtype int8: this build of PyTorch has no oneDNN: take fp32 or bf16")


def int8_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The linear layer of a weight (o, i) and a bias (o,): x (..., i) -> (..., o), as x's type."""
    weight = weight.float()
    scales = scales_of(weight, WEIGHT)
    rounded = (weight / scales).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded, None)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    summand = torch.zeros(()) if bias is None else bias.float()
    to_round = torch.tensor(ZERO + 0.5)  # what comes after the point is cut off

    def product(x: Tensor) -> Tensor:
        rows = x.float().flatten(0, -2)
        row_scales = scales_of(rows, LARGEST)
        numbers = torch.addcmul(to_round, rows, row_scales.reciprocal()).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            *(numbers, 1.0, ZERO),
            *(packed, scales.flatten(), zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )  # (rows, o)
        y = torch.addcmul(summand, y, row_scales, out=y)
        return y.to(x.dtype).view(*x.shape[:-1], len(weight))

    return product


def scales_of(x: Tensor, largest: int) -> Tensor:
    """Scales (n, 1) of the rows of x (n, i), so that no number by its row's is above `largest`."""
    most = torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True)
    return most.clamp(min=1e-30) / largest
