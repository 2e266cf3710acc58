"""PSNR, SSIM and L1 against direct formulas."""

import numpy as np
import pytest
import torch

from maskgit.evaluation.quality import l1, psnr, ssim


def images(count=3, height=20, width=24, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def direct_ssim(x, y):
    """Window by window, channel by channel, as the paper's equations stand."""
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for a, b in zip(x, y, strict=True):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                both = (weights * (p - mp) * (q - mq)).sum()
                light = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
                values.append(light * (2 * both + 9e-4) / (vp + vq + 9e-4))
    return np.mean(values)


def test_ssim_against_a_direct_loop():
    x = (images() * 255).round() / 255
    y = ((x + 0.2 * images(seed=1)).clamp(0, 1) * 255).round() / 255
    direct = [
        direct_ssim(a, b) for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)
    ]
    assert ssim(x, y).tolist() == pytest.approx(direct, abs=1e-7)
    assert ssim(x, x).tolist() == pytest.approx([1] * 3)


def test_psnr_and_l1_by_hand():
    x = torch.zeros(2, 3, 16, 16)
    y = x.clone()
    y[1] += 10 / 255
    assert psnr(x, y).tolist() == pytest.approx([100, 20 * np.log10(25.5)])
    assert l1(x, y).tolist() == pytest.approx([0, 10 / 255])


def test_what_is_measured_are_bytes():
    x = (images() * 255).round() / 255
    assert psnr(x, x + 0.4 / 255).tolist() == [100] * 3
    assert l1(x, x - 0.4 / 255).tolist() == [0] * 3
