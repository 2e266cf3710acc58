"""Mask schedules: the formulas, their shapes as the paper classes them, and exact counts."""

import math

import pytest
import torch

from maskgit.common import UserError, pick
from maskgit.schedule import SCHEDULES, masked_count

R = torch.linspace(0, 1, 1001, dtype=torch.float64)
N = 256

# Chang et al. 2022, section 3.3; the arccos is not in the paper, but bends as its cosine does.
CONCAVE = "cosine", "arccos", "square", "cubic", "exponential"
CONVEX = "square-root", "logarithmic"
COUNTED = ("halton",)  # the arccos in whole tokens: it has steps

BY_HAND = {
    "cosine": lambda r, n: math.cos(math.pi * r / 2),
    "arccos": lambda r, n: 2 * math.acos(r) / math.pi,
    "halton": lambda r, n: 1 - int(n * (1 - math.acos(r) * 2 / math.pi)) / n,
    "linear": lambda r, n: 1 - r,
    "square": lambda r, n: 1 - r * r,
    "cubic": lambda r, n: 1 - r * r * r,
    "square-root": lambda r, n: 1 - math.sqrt(r),
    "logarithmic": lambda r, n: min(1, -math.log(r) / math.log(n)),
    "exponential": lambda r, n: 1 - 2 ** (-math.log2(n) * (1 - r)),
}


def test_every_schedule_is_checked():
    assert set(SCHEDULES) == {*CONCAVE, *CONVEX, *COUNTED, "linear"} == set(BY_HAND)


@pytest.mark.parametrize("name", SCHEDULES)
def test_formula_at_numbers_and_tensors(name):
    points = [0.125, 0.3, 0.5, 0.875, 0.99]
    expected = [BY_HAND[name](r, N) for r in points]
    assert [SCHEDULES[name](r, N) for r in points] == pytest.approx(expected, abs=1e-12)
    shares = SCHEDULES[name](torch.tensor(points, dtype=torch.float64), N)
    assert shares.dtype == torch.float64
    assert shares.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 64, N])
@pytest.mark.parametrize("name", SCHEDULES)
def test_falls_from_one_to_zero(name, n):
    schedule = SCHEDULES[name]
    shares = schedule(R, n)
    assert shares.min() >= 0 and shares.max() <= 1
    assert (shares.diff() <= 0).all()
    assert schedule(0.0, n) == shares[0] == (1 - 1 / n if name == "exponential" else 1)
    assert schedule(1.0, n) == shares[-1] == 0


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in COUNTED])
def test_bends_as_the_paper_says(name):
    shares = SCHEDULES[name](R, N)
    bend = shares[R > 1 / N].diff(n=2)  # below 1/N the logarithm is clipped
    rounding = 1e-12
    if name in CONCAVE:
        assert (bend < rounding).all() and bend.min() < -1e-8
    elif name in CONVEX:
        assert (bend > -rounding).all() and bend.max() > 1e-8
    else:
        assert (bend.abs() < rounding).all()


def test_one_count_of_tokens_an_image():
    n = torch.tensor([0, 1, 9, N])
    for schedule in SCHEDULES.values():
        shares = schedule(R[:, None], n)
        assert shares.isfinite().all()
        for column, count in enumerate(n.tolist()):
            torch.testing.assert_close(shares.expand(-1, 4)[:, column], schedule(R, count))


def test_count_survives_rounding():
    assert (1 - 0.9) * 10 < 1  # 0.9999999999999998, and 1 is meant
    assert masked_count(1 - 0.9, 10) == 1
    assert masked_count(SCHEDULES["cosine"](2 / 3, 256), 256) == 128
    assert masked_count(0.999, 10) == 9
    assert masked_count(0.0, 10) == 0
    counts = masked_count(torch.tensor([0.1, 0.5], dtype=torch.float64), torch.tensor([30, 7]))
    assert counts.dtype == torch.int64 and counts.tolist() == [3, 3]


def test_official_counts_at_256_tokens():
    """floor(256 cos(pi r / 2)) for r = 1/8 .. 8/8, as MaskGIT's released code counts."""
    counts = [masked_count(SCHEDULES["cosine"](t / 8, 256), 256) for t in range(1, 9)]
    assert counts == [251, 236, 212, 181, 142, 97, 49, 0]


@pytest.mark.parametrize("n", [256, 576, 1024])
@pytest.mark.parametrize("steps", [8, 12, 32, 64])
def test_counts_of_halton_maskgit(n, steps):
    """int(n (1 - 2 / pi arccos(r))) settled, or as many as steps, as its released code counts."""
    settled = [max(t, int(n * (1 - math.acos(t / steps) * 2 / math.pi))) for t in range(1, steps)]
    masked = [masked_count(SCHEDULES["halton"](t / steps, n), n) for t in range(1, steps + 1)]
    assert masked == [n - count for count in settled] + [0]


def test_unknown_name():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        pick(SCHEDULES, "cosin", "schedule")
