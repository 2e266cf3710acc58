"""The training mask: exact counts, uniform positions. The noise of decoding: uniform everywhere."""

import math

import pytest
import torch

from maskgit import noise
from maskgit.masking import random_mask
from maskgit.schedule import SCHEDULES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masks_exactly_the_scheduled_count(schedule):
    mask, r = random_mask((500, 64), schedule, generator())
    assert mask.dtype == torch.bool and mask.shape == (500, 64)
    assert r.dtype == torch.float64 and (r >= 0).all() and (r < 1).all()
    expected = [max(1, round(SCHEDULES[schedule](x, 64) * 64)) for x in r.tolist()]
    assert mask.sum(-1).tolist() == expected


def test_masks_at_least_one():
    mask, _ = random_mask((200, 2), "square-root", generator())
    assert mask.any(-1).all()
    mask, _ = random_mask((8, 1), "cosine", generator())
    assert mask.all()


def test_progress_and_positions_are_uniform():
    mask, r = random_mask((20_000, 16), "cosine", generator())
    assert z(torch.histc(r, 10, 0, 1)) < 4
    # The mean of cos(pi r / 2) over [0, 1] is 2 / pi: 64% are masked, not 36%.
    assert mask.double().mean().item() == pytest.approx(2 / math.pi, abs=0.005)
    share = mask.double().mean(0)
    assert (share - share.mean()).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    # Within images of one count, pairs of positions are masked together equally often.
    rows = mask[mask.sum(-1) == 8].double()
    together = (rows.T @ rows / len(rows))[~torch.eye(16, dtype=torch.bool)]
    assert (together - 8 * 7 / (16 * 15)).abs().max() < 5 * math.sqrt(0.25 / len(rows))


def test_generator_decides():
    first, again, other = (random_mask((4, 32), "cosine", generator(s))[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def z(counts: torch.Tensor) -> float:
    """Chi-square of equal cells, in standard deviations above what is expected."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seeds", [torch.arange(1000), torch.arange(1000) * 2**33 - 2**40])
def test_noise_is_uniform_and_open(seeds):
    u = noise.uniform(seeds, 3, 256, noise.TOKEN)
    assert u.dtype == torch.float32 and u.shape == (1000, 256)
    assert u.min() > 0 and u.max() < 1
    assert u.unique().numel() > 0.98 * u.numel()
    assert z(torch.histc(u, 256, 0, 1)) < 4
    assert abs(z(torch.histc(u[:, 7], 20, 0, 1))) < 4  # one position over the seeds
    assert abs(z(torch.histc(u[7], 8, 0, 1))) < 4  # one seed over the positions
    gumbel = -torch.log(-torch.log(u))
    assert gumbel.isfinite().all()
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.02)


def test_noise_is_independent_of_its_neighbours():
    """Next position, next seed, next step, other stream: each pair fills the square evenly."""
    seeds = torch.arange(1000)
    u = noise.uniform(seeds, 3, 256, noise.TOKEN)
    neighbours = {
        "position": (u[:, :-1], u[:, 1:]),
        "row": (u[:, :-16], u[:, 16:]),
        "seed": (u[:-1], u[1:]),
        "step": (u, noise.uniform(seeds, 4, 256, noise.TOKEN)),
        "stream": (u, noise.uniform(seeds, 3, 256, noise.CHOICE)),
        "high half of the seed": (u, noise.uniform(seeds + 2**32, 3, 256, noise.TOKEN)),
    }
    for name, (a, b) in neighbours.items():
        cells = (a * 16).long() * 16 + (b * 16).long()
        assert abs(z(torch.bincount(cells.flatten(), minlength=256).double())) < 4, name
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.01, name


def test_noise_depends_on_its_words_alone():
    u = noise.uniform(torch.tensor([5, -1, 2**62]), 2, 8, noise.CHOICE)
    assert torch.equal(noise.uniform(torch.tensor([2**62]), 2, 3, noise.CHOICE), u[2:, :3])
    # Fixed for good, since a seed names an image.
    first = [0.878170907497406, 0.2769685387611389, 0.608058512210846]
    assert noise.uniform(torch.tensor([0]), 0, 3, noise.TOKEN).tolist() == [first]
