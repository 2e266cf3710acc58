"""How training varies small images for networks that are to name them: an engine's crops and
mirroring leave too much the same where there are few."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit.common import noise


@dataclass
class VaryConfig:
    """Each range is symmetric around "as it is"."""

    turn: float = 10.0  # degrees that an image is turned at most
    zoom: float = 0.2  # by exp(zoom) at most, smaller or larger
    shift: float = 0.08  # of its side at most
    gamma: float = 0.3  # a power exp(gamma) at most of each channel: black and white stay


def vary(images: Tensor, config: VaryConfig, seeds: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], each turned, zoomed, shifted and coloured at random.

    seeds: int64 (B,), what is drawn for an image being a function of its own alone. What comes
    into view continues the edge, which of drawings is their ground.
    """
    b = len(images)
    drawn = noise.uniform(seeds, 0, 7, noise.VARY).to(images.dtype) * 2 - 1  # (B, 7) in (-1, 1)
    angle, scale = drawn[:, 0] * math.radians(config.turn), (drawn[:, 1] * config.zoom).exp()
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = drawn[:, 2:4] * 2 * config.shift  # a side has length 2
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return images.clamp(1e-6, 1) ** (drawn[:, 4:] * config.gamma).exp()[:, :, None, None]
