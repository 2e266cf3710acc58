"""Streamed statistics and the Frechet distance, against numpy, scipy, torch-fidelity and theory."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from maskgit.common import UserError
from maskgit.evaluation.statistics import Gaussian, frechet, frechet_infinity


def features(count, dim, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(count, dim, generator=generator) @ mix + shift


def distance(a, b):
    x, y = Gaussian(a.shape[1]).update(a), Gaussian(b.shape[1]).update(b)
    return frechet(x.mean, x.covariance, y.mean, y.covariance)


def test_streamed_and_merged_statistics_are_those_of_numpy():
    x = features(1000, 16, 0, shift=50.0)  # a mean far from 0, where naive sums lose digits
    parts = [Gaussian(16) for _ in range(3)]
    for i, rows in enumerate(x.split([1, 499, 7, 300, 193])):
        parts[i % 3].update(rows)
    merged = Gaussian(16)
    for part in parts:
        merged.merge(part)
    merged.merge(Gaussian(16))  # of nothing
    assert merged.count == 1000
    exact = x.double().numpy()
    np.testing.assert_allclose(merged.mean.numpy(), exact.mean(0), rtol=1e-9)
    np.testing.assert_allclose(merged.covariance.numpy(), np.cov(exact.T), rtol=1e-9, atol=1e-9)


def test_features_that_are_not_finite_are_told():
    x = torch.ones(8, 4)
    x[2, 1], x[5, 0] = torch.nan, torch.inf
    gaussian = Gaussian(4).update(torch.ones(2, 4))
    with pytest.raises(UserError, match="2 of 8 images are not finite"):
        gaussian.update(x)
    assert gaussian.count == 2 and gaussian.mean.tolist() == [1] * 4
    with pytest.raises(UserError, match="1 images have no covariance"):
        _ = Gaussian(4).update(torch.ones(1, 4)).covariance


def test_two_known_gaussians():
    zero, one = torch.zeros(3), torch.eye(3)
    assert frechet(zero, one, zero, one) == pytest.approx(0, abs=1e-12)
    assert frechet(zero, one, zero + 2, one) == pytest.approx(12)
    # between diagonal covariances: the sum of (sigma1 - sigma2)^2
    other = torch.diag(torch.tensor([4.0, 9.0, 0.0]))
    assert frechet(zero, one, zero, other) == pytest.approx(1 + 4 + 1)
    assert frechet(zero, other, zero, one) == pytest.approx(1 + 4 + 1)


def test_identical_sets_and_halves_of_one():
    x = features(2000, 8, 1)
    assert distance(x, x) == pytest.approx(0, abs=1e-9)
    halves = distance(x[:1000], x[1000:])
    assert 0 < halves < 0.1 < distance(x[:1000], x[1000:] + 1)


def test_equal_to_torch_fidelity_and_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = features(3000, 32, 2), features(2000, 32, 3, shift=0.3)
    ours = distance(a, b)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    c1, c2 = (np.cov(x.double().numpy().T) for x in (a, b))
    root = linalg.sqrtm(c1 @ c2).real
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    assert ours == pytest.approx(shift + np.trace(c1 + c2 - 2 * root), rel=1e-9)


def test_singular_covariances_need_no_epsilon():
    a, b = features(10, 32, 4), features(12, 32, 5)  # of rank 9 and 11
    x, y = Gaussian(32).update(a), Gaussian(32).update(b)
    values = [frechet(x.mean, x.covariance, y.mean, y.covariance)]
    values.append(frechet(y.mean, y.covariance, x.mean, x.covariance))
    assert values[0] == pytest.approx(values[1], rel=1e-7)
    # the trace of the root is the nuclear norm of the product of the factors (Bures distance)
    left, right = ((z - z.mean(0)).double() / (len(z) - 1) ** 0.5 for z in (a, b))
    cross = torch.linalg.svdvals(left @ right.T).sum().item()
    shift = (x.mean - y.mean).square().sum().item()
    total = (x.covariance.trace() + y.covariance.trace()).item()
    assert values[0] == pytest.approx(shift + total - 2 * cross, rel=1e-7)


def test_extrapolation_takes_the_bias_of_few_images_away():
    dim = 16
    x = torch.randn(4000, dim, generator=torch.Generator().manual_seed(6))
    reference = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    value, points = frechet_infinity(x, reference)
    assert len(points) == 15 and points[-1][0] == 4000
    assert points[0][1] > 5 * points[-1][1] > 0  # the true distance is 0
    assert abs(value) < points[-1][1] / 2
    slope, intercept = np.polyfit([1 / n for n, _ in points], [d for _, d in points], 1)
    assert slope > 0 and value == pytest.approx(intercept)
    assert frechet_infinity(x, reference) == (value, points)
    with pytest.raises(UserError, match="needs over 17 images: 17"):
        frechet_infinity(x[:17], reference)
