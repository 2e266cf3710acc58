"""How near a reconstruction is to its image; each gives one number an image, (B,)."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, section III.C
C1, C2 = 0.01**2, 0.03**2  # for a range of 1


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [0, 1], rounded to uint8 before;
    equal ones have 100."""
    error = (_rounded(x) - _rounded(y)).square().mean((1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of images (B, 3, H, W) in [0, 1], rounded to uint8 before."""
    return (_rounded(x) - _rounded(y)).abs().mean((1, 2, 3))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13) of images (B, 3, H, W) in [0, 1]: the mean
    over channels and over the windows that lie in the image."""
    x, y = _rounded(x), _rounded(y)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x.square()
    var_y = _blur(y * y) - mean_y.square()
    both = _blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * both + C2) / (var_x + var_y + C2)
    return (light * structure).mean((1, 2, 3))


def _rounded(x: Tensor) -> Tensor:
    return (x.double() * 255).round() / 255


def _blur(x: Tensor) -> Tensor:
    """Means over Gaussian windows, (B, C, H - 10, W - 10)."""
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.exp(-at.square() / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, WINDOW)
    x = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])
