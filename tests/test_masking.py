"""The training mask: exact counts, uniform positions. The noise behind it and behind decoding:
uniform everywhere."""

import itertools
import math

import pytest
import torch

from maskgit.common import noise
from maskgit.engine.order import sample_seeds
from maskgit.masking import random_mask
from maskgit.schedule import SCHEDULES

STREAMS = [value for name, value in vars(noise).items() if name.isupper() and name[0] != "_"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masks_exactly_the_scheduled_count(schedule):
    mask, r = random_mask(torch.arange(500), 64, schedule)
    assert mask.dtype == torch.bool and mask.shape == (500, 64)
    assert r.dtype == torch.float64 and (r >= 0).all() and (r < 1).all()
    expected = [max(1, round(SCHEDULES[schedule](x, 64) * 64)) for x in r.tolist()]
    assert mask.sum(-1).tolist() == expected


def test_masks_at_least_one():
    mask, _ = random_mask(torch.arange(200), 2, "square-root")
    assert mask.any(-1).all()
    mask, _ = random_mask(torch.arange(8), 1, "cosine")
    assert mask.all()


def test_progress_and_positions_are_uniform():
    mask, r = random_mask(sample_seeds(0, range(20_000)), 16, "cosine")
    assert z(torch.histc(r, 10, 0, 1)) < 4
    # The mean of cos(pi r / 2) over [0, 1] is 2 / pi: 64% are masked, not 36%.
    assert mask.double().mean().item() == pytest.approx(2 / math.pi, abs=0.005)
    share = mask.double().mean(0)
    assert (share - share.mean()).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    # How much is masked says nothing about where, nor one image about the next.
    assert abs(torch.corrcoef(torch.stack([r[:-1], r[1:]]))[0, 1]) < 0.03
    assert ((mask[:-1] == mask[1:]).double().mean(0) - expected_agreement(r, 16)).abs().max() < 0.02
    # Within images of one count, pairs of positions are masked together equally often.
    rows = mask[mask.sum(-1) == 8].double()
    together = (rows.T @ rows / len(rows))[~torch.eye(16, dtype=torch.bool)]
    assert (together - 8 * 7 / (16 * 15)).abs().max() < 5 * math.sqrt(0.25 / len(rows))


def expected_agreement(r: torch.Tensor, n: int) -> float:
    """How often a position of an image agrees with that of the next, if both are independent."""
    share = ((torch.cos(r * math.pi / 2) * n).round().clamp(min=1) / n).mean()
    return (share**2 + (1 - share) ** 2).item()


def test_the_seed_alone_decides():
    state = torch.random.get_rng_state()
    seeds = sample_seeds(3, range(5))
    mask, r = random_mask(seeds, 32, "cosine")
    for rows in ([0, 1], [4, 2], [3]):  # whatever else is in the batch
        again, progress = random_mask(seeds[rows], 32, "cosine")
        assert torch.equal(again, mask[rows]) and torch.equal(progress, r[rows])
    assert len({row.numpy().tobytes() for row in mask}) == len(set(r.tolist())) == 5
    assert not torch.equal(random_mask(sample_seeds(4, range(5)), 32, "cosine")[0], mask)
    assert torch.equal(state, torch.random.get_rng_state())


def test_samples_of_all_runs_have_seeds_of_their_own():
    runs = [sample_seeds(seed, range(0, 3000, 3)) for seed in (0, 1, 2, 12_345, 2**20 - 1)]
    seeds = torch.cat(runs)
    assert seeds.dtype == torch.int64 and seeds.min() >= 0 and seeds.unique().numel() == 5000
    assert torch.equal(sample_seeds(1, [2999, 6]), sample_seeds(1, range(3000))[[2999, 6]])
    assert torch.equal(sample_seeds(0, [2**40]), torch.tensor([2**40]))
    # No two runs' seeds ever meet: they start further apart than a run is long.
    apart = int(sample_seeds(1, [0])[0])
    starts = sorted(seed * apart % 2**63 for seed in range(2**20))
    assert all(sample_seeds(seed, [5])[0] == seed * apart % 2**63 + 5 for seed in (2, 77, 2**19))
    gaps = [b - a for a, b in itertools.pairwise([*starts, starts[0] + 2**63])]
    assert min(gaps) > 2**40


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
        **{
            f"stream {s}": (u, noise.uniform(seeds, 3, 256, s)) for s in STREAMS if s > noise.CHOICE
        },
        "streams of the mask": tuple(
            noise.uniform(seeds, 0, 256, s) for s in (noise.MASK_RATIO, noise.MASK)
        ),
        "high half of the seed": (u, noise.uniform(seeds + 2**32, 3, 256, noise.TOKEN)),
    }
    for name, (a, b) in neighbours.items():
        cells = (a * 16).long() * 16 + (b * 16).long()
        assert abs(z(torch.bincount(cells.flatten(), minlength=256).double())) < 4, name
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.01, name


def test_streams_are_different_and_those_of_decoding_are_fixed():
    assert len(set(STREAMS)) == len(STREAMS) >= 8
    assert (noise.TOKEN, noise.CHOICE) == (0, 1)  # they name images


def test_noise_depends_on_its_words_alone():
    u = noise.uniform(torch.tensor([5, -1, 2**62]), 2, 8, noise.CHOICE)
    assert torch.equal(noise.uniform(torch.tensor([2**62]), 2, 3, noise.CHOICE), u[2:, :3])
    # Fixed for good, since a seed names an image.
    first = [0.878170907497406, 0.2769685387611389, 0.608058512210846]
    assert noise.uniform(torch.tensor([0]), 0, 3, noise.TOKEN).tolist() == [first]
