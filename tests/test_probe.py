"""Linear and few-shot probes, against scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from test_zero_shot import units

from clip.probe import GRID, few_shot, fit, linear_probe, shots, split, sweep
from maskgit.common import UserError


def clusters(count, classes, width=12, noise=1.0, seed=0):
    """Features that tell their classes, but not perfectly; and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    noisy = centres[labels] + noise * torch.randn(count, width, generator=generator)
    return F.normalize(noisy, dim=-1), labels


@pytest.mark.parametrize("C", [1e-4, 0.316, 100.0])
def test_the_probe_is_scikit_learns(C):
    from sklearn.linear_model import LogisticRegression

    x, y = clusters(200, 5)
    ours = fit(x, y, 5, C)
    theirs = LogisticRegression(C=C, tol=1e-9, max_iter=10_000).fit(x.double().numpy(), y.numpy())
    expected = theirs.predict_proba(x.double().numpy())
    np.testing.assert_allclose(ours.logits(x).softmax(1).numpy(), expected, atol=1e-4)
    likely = np.log(expected[np.arange(200), y.numpy()])
    objective = 0.5 * (theirs.coef_**2).sum() - C * likely.sum()
    assert ours.objective == pytest.approx(objective, rel=1e-6)
    assert ours.accuracy(x, y) == pytest.approx(theirs.score(x.double().numpy(), y.numpy()))


def test_the_probe_starts_anywhere_and_works_in_blocks(monkeypatch):
    x, y = clusters(200, 5)
    whole = fit(x, y, 5, 1.0)
    again = fit(x, y, 5, 1.0, start=fit(x, y, 5, 1000.0))
    monkeypatch.setattr("clip.probe.ROWS", 33)
    blocks = fit(x, y, 5, 1.0)
    for other in (again, blocks):
        assert other.objective == pytest.approx(whole.objective, rel=1e-9)
        torch.testing.assert_close(other.weight, whole.weight, rtol=0, atol=1e-3)


def test_the_sweep_refines_around_the_best():
    x, y = clusters(400, 8, width=6, noise=2.0)
    train, held = (x[:200], y[:200]), (x[200:], y[200:])
    best, tried = sweep(train, held, 8)
    assert {10.0**e for e in GRID} <= set(tried) and tried[best] == max(tried.values())
    exponents = np.log10(sorted(tried))
    assert np.abs(exponents - math.log10(best)).min() < 1e-9
    steps = np.sort(np.abs(exponents - math.log10(best)))
    assert steps[1] == pytest.approx(0.125)  # to an eighth of a decade
    assert len(tried) <= len(GRID) + 8 and min(exponents) >= -6 and max(exponents) <= 6
    direct = fit(*train, 8, best).accuracy(*held)
    assert tried[best] == pytest.approx(direct)


def test_the_probe_is_refitted_on_everything():
    x, y = clusters(90, 3, width=6, noise=3.0)
    probe, tried = linear_probe(x, y, 3, seed=3)
    assert probe.C in tried
    direct = fit(x, y, 3, probe.C)
    torch.testing.assert_close(probe.weight, direct.weight)
    again, _ = linear_probe(x, y, 3, seed=3)
    assert torch.equal(again.weight, probe.weight)


def test_splits_keep_an_image_of_every_class():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2] * 1 + [3] * 2)
    train, held = split(labels, 0.2, seed=1)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(16))
    assert labels[held].tolist() == [0, 0, 1] and set(labels[train].tolist()) == {0, 1, 2, 3}
    assert not torch.equal(split(labels, 0.2, seed=2)[1], held)
    with pytest.raises(UserError) as error:
        linear_probe(units(4), torch.tensor([0, 0, 1, 2]), 3)
    one_line(error, "3 or more images")


def test_shots_are_a_function_of_the_seed():
    labels = torch.arange(60) % 3
    drawn, others = shots(labels, 4, seed=5)
    assert labels[drawn].bincount().tolist() == [4, 4, 4]
    assert labels[others].bincount().tolist() == [4, 4, 4]
    assert not set(drawn.tolist()) & set(others.tolist())
    assert torch.equal(drawn, shots(labels, 4, seed=5)[0])
    assert not torch.equal(drawn, shots(labels, 4, seed=6)[0])
    assert set(drawn.tolist()) < set(shots(labels, 8, seed=5)[0].tolist())
    # an image more of another class changes nothing for this one
    more = torch.cat([labels, torch.tensor([2])])
    assert [i for i in shots(more, 4, seed=5)[0].tolist() if more[i] < 2] == [
        i for i in drawn.tolist() if labels[i] < 2
    ]
    assert len(shots(labels, 20)[1]) == 0 and len(shots(labels, 100)[0]) == 60


def test_more_shots_are_better_and_the_fit_uses_only_them():
    x, y = clusters(240, 6, width=8, noise=1.5)
    test = clusters(600, 6, width=8, noise=1.5, seed=1)
    accuracies = []
    for k in (1, 16):
        probe, count = few_shot(x, y, 6, k)
        assert count == 6 * k
        drawn, _ = shots(y, k)
        torch.testing.assert_close(probe.weight, fit(x[drawn], y[drawn], 6, probe.C).weight)
        accuracies.append(probe.accuracy(*test))
    assert 1 / 6 < accuracies[0] < accuracies[1]
    probe, _ = few_shot(x, y, 6, 100)  # all there are: nothing is left to choose C by
    assert probe.C == 0.316
