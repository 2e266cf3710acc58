"""Scores against torch-fidelity's on the same features, and against direct formulas."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from maskgit.common import UserError
from maskgit.evaluation import metrics


def draw(count, dim=12, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * scale + shift


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 37)


def test_inception_score_equals_torch_fidelity_on_its_permutation():
    logits = draw(1003, 20, scale=3.0)
    theirs = isc_features_to_metric(logits, splits=10, rng_seed=2020)
    order = torch.from_numpy(np.random.RandomState(2020).permutation(1003))
    mean, deviation = metrics.inception_score(logits, 10, order)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_inception_score_of_known_distributions():
    sure = torch.eye(10).repeat(50, 1) * 1000  # each class as often, each image certain
    assert metrics.inception_score(sure)[0] == pytest.approx(10)
    assert metrics.inception_score(torch.zeros(500, 10))[0] == pytest.approx(1)


@pytest.mark.parametrize("seed", [0, 2020])
def test_kid_equals_torch_fidelity_on_its_subsets(seed):
    fake, real = draw(300, seed=1), draw(250, seed=2, shift=0.1)
    options = dict(kid_subsets=7, kid_subset_size=100, rng_seed=seed, verbose=False)
    theirs = kid_features_to_metric(fake.double(), real.double(), **options)
    mean, deviation = metrics.kid(fake, real, 7, 100, seed)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-7)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-7)


def test_kid_is_unbiased_and_refuses_too_few():
    values = [metrics.kid(draw(100, seed=i), draw(100, seed=99 - i), 1, 100)[0] for i in range(40)]
    assert min(values) < 0 < max(values)
    with pytest.raises(UserError, match="subsets of 1000 need as many images, not 999"):
        metrics.kid(draw(999), draw(2000))


@pytest.mark.parametrize("ram", [False, True])
def test_precision_and_recall_equal_torch_fidelity(ram, small_blocks):
    real, fake = draw(310, seed=3), draw(290, seed=4, shift=0.4, scale=0.7)
    options = dict(prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=ram, verbose=False)
    theirs = prc_features_to_metric(fake, real, **options)
    precision, recall = metrics.precision_recall(real, fake)
    assert 0.1 < recall < precision < 1
    assert precision == pytest.approx(theirs["precision"], rel=1e-4)
    assert recall == pytest.approx(theirs["recall"], rel=1e-4)


def test_precision_and_recall_are_not_flipped():
    real = draw(200, seed=5)
    fake = real[:1].repeat(200, 1) + 1e-3 * draw(200, seed=6)  # one good image, over and over
    precision, recall = metrics.precision_recall(real, fake)
    assert precision > 0.9 and recall < 0.1


def test_density_and_coverage_against_the_formula(small_blocks):
    real, fake, k = draw(120, seed=7), draw(140, seed=8, shift=0.2), 5
    reach = torch.cdist(real.double(), real.double()).sort(1).values[:, k]
    inside = torch.cdist(real.double(), fake.double()) <= reach[:, None]  # (M, N)
    density, coverage = metrics.density_coverage(real, fake, k)
    assert density == pytest.approx((inside.sum(0).double() / k).mean().item())
    assert coverage == pytest.approx(inside.any(1).double().mean().item())


def test_cmmd_against_the_formula(small_blocks):
    x, y = draw(90, seed=9), draw(80, seed=10, shift=1.0)
    a, b = (z.double() / z.double().norm(dim=1, keepdim=True) for z in (x, y))

    def mean(p, q):
        squared = (p[:, None] - q[None]).square().sum(-1)
        return torch.exp(-squared / (2 * 10.0**2)).mean().item()

    direct = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert metrics.cmmd(x, y) == pytest.approx(direct, rel=1e-6)
    assert metrics.cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_nearest_against_all_pairs(small_blocks):
    of, among = draw(100, seed=11), draw(130, seed=12)
    of[7] = among[99]
    distances, rows = metrics.nearest(of, among)
    direct = torch.cdist(of.double(), among.double()).min(1)
    torch.testing.assert_close(distances, direct.values, rtol=1e-9, atol=1e-6)
    assert torch.equal(rows, direct.indices) and rows[7] == 99


def test_blocks_change_nothing(monkeypatch):
    real, fake = draw(150, seed=13), draw(160, seed=14)
    whole = [f(real, fake) for f in (metrics.precision_recall, metrics.density_coverage)]
    monkeypatch.setattr(metrics, "BLOCK", 7)
    assert whole == [f(real, fake) for f in (metrics.precision_recall, metrics.density_coverage)]


def test_no_matrix_over_all_pairs_is_held(monkeypatch):
    largest = 0
    original = metrics._squared

    def watched(x, y):
        nonlocal largest
        largest = max(largest, len(x) * len(y))
        return original(x, y)

    monkeypatch.setattr(metrics, "_squared", watched)
    real, fake = draw(2100, 4), draw(2300, 4, seed=1)
    metrics.precision_recall(real, fake)
    metrics.density_coverage(real, fake)
    assert largest == metrics.BLOCK**2  # 32 MiB in float64, whatever the number of images


def test_accuracy():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    assert metrics.accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75


def test_too_few_images_are_refused_and_not_scored_as_perfect():
    for few, of, why in (
        (metrics.precision_recall, (draw(3), draw(50)), "3-th neighbour needs 4 images"),
        (metrics.density_coverage, (draw(5), draw(50)), "5-th neighbour needs 6 images"),
        (metrics.inception_score, (draw(9),), "10 splits need as many images, not 9"),
    ):
        with pytest.raises(UserError, match=why):
            few(*of)
