"""The patch discriminator: is this patch of a picture real? (Isola et al. 2017, pix2pix, 3.2.2)."""

from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from maskgit.common import UserError, pick
from maskgit.common.precision import widen

NORMS = {
    "group": lambda width: nn.GroupNorm(gcd(32, width), width),
    "spectral": lambda width: nn.Identity(),  # the convolutions themselves are normalised
    "none": lambda width: nn.Identity(),
}


@dataclass
class DiscriminatorConfig:
    """`norm` is "group", "spectral" (Miyato et al. 2018: kernels of spectral norm 1) or "none".

    BatchNorm, the published choice, is left out: its statistics would be each process's own, and
    would mix real and generated pictures differently from one way of batching to another.
    """

    channels: int = 64  # of the first layer, doubled by each of the next, at most 8 times
    layers: int | None = None  # that halve the picture; None: as many as fit it
    norm: str = "group"

    def __post_init__(self) -> None:
        pick(NORMS, self.norm, "norm of the discriminator")


class Spectral(nn.Module):
    """A kernel divided by its spectral norm.

    PyTorch's own takes one power iteration at each pass and keeps where it came to, so that a batch
    in two halves ends elsewhere than in one. Here the norm is a function of the kernel alone: of
    the Gram matrix, squared eight times over, which is 256 power iterations.
    """

    def forward(self, kernel: Tensor) -> Tensor:
        with torch.autocast(kernel.device.type, enabled=False):
            matrix = kernel.flatten(1)  # (outputs, inputs)
            with torch.no_grad():
                gram = matrix @ matrix.T
                for _ in range(8):
                    gram = gram / gram.norm().clamp_min(1e-12)
                    gram = gram @ gram
                most = gram.diagonal().argmax()[None]  # an index that a GPU keeps to itself
                left = F.normalize(gram.index_select(0, most)[0], dim=0)  # (outputs,)
                right = F.normalize(matrix.T @ left, dim=0)  # (inputs,)
            return kernel / (left @ matrix @ right).clamp_min(1e-12)


def spectral(conv: nn.Conv2d) -> nn.Module:
    return register_parametrization(conv, "weight", Spectral())


def receptive_field(layers: int) -> int:
    """Side, in pixels, of the patch that one logit sees: 16, 34, 70, 142 for 1, 2, 3, 4 layers."""
    return 9 * 2**layers - 2


def fitting_layers(size: int) -> int:
    """How many halving layers see no more than pictures of `size` pixels; 3, as published, at most.

    A patch larger than the picture would judge the padding. UserError below 16 pixels.
    """
    fitting = [layers for layers in (1, 2, 3) if receptive_field(layers) <= size]
    if not fitting:
        raise UserError(f"a patch discriminator needs pictures of 16 pixels or more, not {size}")
    return fitting[-1]


class Discriminator(nn.Module):
    """(B, 3, H, W) in [0, 1] -> logits (B, 1, h, w), positive for real, and the features.

    Logits are in float32, or wider where the network is. `size` is the shorter side
    of the pictures. The sequence is laid out as in the published VQGAN, so that `main.{i}` names
    the same tensor there. The receptive field is a patch only by its convolutions: GroupNorm lets
    a picture's statistics through from everywhere in it.
    """

    def __init__(self, config: DiscriminatorConfig, size: int) -> None:
        super().__init__()
        layers = fitting_layers(size) if config.layers is None else config.layers
        if layers < 1 or size >> layers < 3:
            raise UserError(f"{layers} layers of a discriminator do not fit {size} pixels")
        wrap = spectral if config.norm == "spectral" else lambda conv: conv
        bias = config.norm != "group"  # the norm has its own
        width = config.channels
        main: list[nn.Module] = [wrap(nn.Conv2d(3, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            before, width = width, config.channels * min(2**i, 8)
            conv = wrap(nn.Conv2d(before, width, 4, stride, 1, bias=bias))
            main += [conv, NORMS[config.norm](width), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*main, wrap(nn.Conv2d(width, 1, 4, 1, 1)))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = images * 2 - 1, []  # in [-1, 1], as published
        for layer in self.main:
            x = layer(x)  # (B, C, h, w)
            if isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return widen(x), features
