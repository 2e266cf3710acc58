"""From any image to the pixels that an image tower takes: one contract for files and for tensors.

Both are scaled with antialiasing, rounded to 8 bits, cropped, and normalised by the recipe; what
differs is that PIL rounds between rows and columns too. Without antialiasing, features of large
images would be others (the mean error is 2.5 % of the range, and nothing says so).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip.config import CLIPConfig
from maskgit.common import UserError, pick
from maskgit.common.images import to_rgb
from maskgit.common.precision import widen

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE = 8  # pixels; an image smaller than that shows nothing


def preprocess(images: Sequence[Image] | Tensor, config: CLIPConfig) -> Tensor:
    """PIL images of any mode and size, or a float tensor (B, 3, H, W) in [0, 1] -> normalised
    pixels (B, 3, h, w), fp32 or more. Transparent images lie on white. Raises UserError for a
    tensor of another kind and for images of less than 8 pixels."""
    if isinstance(images, Tensor):
        pixels = scale_tensor(images, config)
        if not (pixels.min() >= -0.01 and pixels.max() <= 1.01):  # false of NaN, too
            raise UserError("images have values that are not in [0, 1]: divide bytes by 255")
    else:
        from PIL import Image

        if not isinstance(images, Sequence) or not all(isinstance(i, Image.Image) for i in images):
            raise UserError(
                "images have to be a list of PIL images, or a float tensor (B, 3, H, W) in [0, 1]"
            )
        scaled = [np.asarray(scale_picture(image, config)) for image in images]
        if not scaled:
            raise UserError("there is no image to encode")
        pixels = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2).float() / 255
    return normalize(pixels, config)


def normalize(pixels: Tensor, config: CLIPConfig) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> by the recipe's mean and deviation of each channel."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return (pixels - mean) / std


def scale_picture(image: Image, config: CLIPConfig) -> Image:
    """A PIL image at the recipe's size, RGB."""
    from PIL.Image import Resampling

    size, target = (image.height, image.width), config.image.size
    between, (top, left) = plan(size, config)
    filters = {"bicubic": Resampling.BICUBIC, "bilinear": Resampling.BILINEAR}
    method = pick(filters, config.interpolation, "interpolation")
    image = to_rgb(image)
    if between != size:
        image = image.resize(between[::-1], method)
    return image.crop((left, top, left + target[1], top + target[0]))


def scale_tensor(images: Tensor, config: CLIPConfig) -> Tensor:
    """A float tensor (B, 3, H, W) in [0, 1] at the recipe's size, in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}: give PIL images, or "
            "floats (B, 3, H, W) in [0, 1]"
        )
    size, (h, w) = (images.shape[2], images.shape[3]), config.image.size
    between, (top, left) = plan(size, config)
    images = widen(images)
    if between != size:
        images = F.interpolate(images, between, mode=config.interpolation, antialias=True)
        # Bicubic overshoots, and files hold 256 steps: without both, the two paths differ by more
        # than 0.1 % of the range on average.
        images = images.clamp(0, 1).mul(255).round() / 255
    return images[:, :, top : top + h, left : left + w]


def plan(size: tuple[int, int], config: CLIPConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """For an image of `size` (height, width): what it is scaled to, and the top and left edge of
    the crop. Cropping: the sides cover the recipe's size, one of them exactly."""
    if min(size) < MIN_SIDE:
        raise UserError(f"an image of {size[1]}x{size[0]} pixels is too small: {MIN_SIDE} or more")
    h, w = config.image.size
    if config.resize == "squash":
        return (h, w), (0, 0)
    if h * size[1] >= w * size[0]:  # the height decides
        between = h, max(w, h * size[1] // size[0])
    else:
        between = max(h, w * size[0] // size[1]), w
    return between, (round((between[0] - h) / 2), round((between[1] - w) / 2))
