"""Parallel decoding: what holds for any model, and a golden trace."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskgit.common import UserError, noise
from maskgit.decode import decode
from maskgit.schedule import SCHEDULES
from maskgit.trace import AT_THE_END, GAP, frames, recorder, save_gif, strip

K = 12
MASK = K


def network(seed: int = 0, sharpness: float = 1.5):
    """A random function of a token, its neighbour, its place and the progress."""
    table = sharpness * torch.randn(4, 64, K + 1, K, generator=torch.Generator().manual_seed(seed))

    def tokens_to_logits(tokens, r):
        places = torch.arange(tokens.shape[1])
        return table[0, places, tokens] + table[1, places, tokens.roll(1, -1)] + r * table[2, 0, 0]

    return tokens_to_logits


def flat(tokens, r):
    return torch.zeros(*tokens.shape, K)


def images(unknown, n, seed=0):
    """One row of n tokens for each number in `unknown`, with so many of them masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(K, (len(unknown), n), generator=generator)
    rank = torch.rand(len(unknown), n, generator=generator).argsort(-1).argsort(-1)
    return tokens.masked_fill(rank < torch.tensor(unknown)[:, None], MASK)


def traced(tokens_to_logits, tokens, **settings):
    """The result of `decode`, and the recorded steps."""
    steps = []
    return decode(tokens_to_logits, tokens, MASK, on_step=recorder(steps), **settings), steps


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 24), min_size=1, max_size=4),
    st.integers(1, 30),
    st.sampled_from(sorted(SCHEDULES)),
    st.sampled_from([0.0, 0.7, 4.5]),
    st.sampled_from([0.0, 1.0, (2.0, 0.1)]),
    st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.9}]),
    st.sampled_from([flat, network(1), network(2, sharpness=60.0)]),
    st.integers(0, 29),
)
def test_invariants(unknown, steps, schedule, choice, temperature, filters, function, start):
    tokens, start = images(unknown, 24), start % steps
    before, progress = tokens.clone(), []

    def tokens_to_logits(now, r):
        progress.append(r)
        assert torch.equal(now == MASK, masks[-1])
        return function(now, r)

    masks, last = [tokens == MASK], tokens
    left = unknown

    def on_step(step, now, mask, confidence):
        nonlocal last, left
        r = (step + 1) / steps
        wanted = [math.floor(u * SCHEDULES[schedule](r, u) + 1e-6) for u in unknown]
        left = [max(0, min(w, n - 1)) for w, n in zip(wanted, left, strict=True)]
        assert mask.sum(-1).tolist() == left
        assert not (mask & ~masks[-1]).any()  # none masked anew
        assert torch.equal(now == MASK, mask)
        settled = last != MASK
        assert torch.equal(now[settled], last[settled])
        assert (confidence == math.inf).equal(settled)
        assert step == start + len(masks) - 1
        masks.append(mask)
        last = now

    result = decode(
        tokens_to_logits,
        tokens,
        MASK,
        steps=steps,
        schedule=schedule,
        temperature=temperature,
        choice_temperature=choice,
        start_step=start,
        seeds=range(len(unknown)),
        on_step=on_step,
        **filters,
    )
    known = before != MASK
    assert torch.equal(tokens, before)
    assert torch.equal(result[known], before[known])
    assert result.dtype == torch.int64 and result.min() >= 0 and result.max() < K
    assert torch.equal(result, last)
    assert progress == [(t + 1) / steps for t in range(start, steps)]


def golden(tokens_to_logits, tokens, steps, choice_temperature, temperature, uniforms):
    """MaskGIT's decoding of one image in numpy, float64: yields the tokens after each step.

    uniforms(t) -> the numbers that the draw and the choice use at step t, (N,) each.
    """
    unknown = np.sum(tokens == MASK)
    for t in range(steps):
        r = (t + 1) / steps
        logits = tokens_to_logits(tokens, r) / temperature
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        u, v = uniforms(t)
        score = np.full(len(tokens), np.inf)
        guess = tokens.copy()
        for i in np.flatnonzero(tokens == MASK):
            guess[i] = np.flatnonzero(np.cumsum(p[i]) > u[i])[0]
            gumbel = -np.log(-np.log(v[i]))
            score[i] = np.log(p[i, guess[i]]) + choice_temperature * (1 - r) * gumbel
        masked = np.sum(tokens == MASK)
        count = min(np.floor(unknown * np.cos(np.pi / 2 * r) + 1e-6), masked - 1)
        tokens = guess.copy()
        tokens[np.argsort(score)[: max(0, int(count))]] = MASK
        yield tokens


@pytest.mark.parametrize("steps, choice, temperature", [(8, 4.5, 1.0), (5, 0.0, 1.0), (12, 9, 0.7)])
def test_golden_trace(steps, choice, temperature):
    start, seeds = images([64, 64, 40, 5, 0], 64), torch.tensor([3, 4, 7, 2**40, -1])
    function = network()
    _, trace = traced(
        function,
        start,
        steps=steps,
        choice_temperature=choice,
        temperature=temperature,
        seeds=seeds,
    )
    for image, seed in enumerate(seeds):

        def in_numpy(tokens, r):
            return function(torch.from_numpy(tokens)[None], r)[0].double().numpy()

        def uniforms(t, seed=seed):
            return [noise.uniform(seed[None], t, 64, s)[0].double().numpy() for s in (0, 1)]

        expected = golden(in_numpy, start[image].numpy(), steps, choice, temperature, uniforms)
        for step, tokens in zip(trace, expected, strict=True):
            assert step.tokens[image].tolist() == tokens.tolist(), (image, step.step)


def test_official_counts_from_blank():
    _, trace = traced(flat, torch.full((2, 256), MASK))
    assert [step.mask.sum(-1).tolist() for step in trace] == [
        [n, n] for n in (251, 236, 212, 181, 142, 97, 49, 0)
    ]


def test_saturated_ties_settle_exact_counts():
    """A certain model: every confidence is 0, so a threshold would settle all or none."""

    def certain(tokens, r):
        return torch.zeros(*tokens.shape, K).index_fill(-1, torch.tensor([5]), 1000.0)

    result, trace = traced(certain, images([16, 9], 16), steps=4, choice_temperature=0)
    assert trace[0].confidence.unique().tolist() == [0, math.inf]
    assert [step.mask.sum(-1).tolist() for step in trace] == [[14, 8], [11, 6], [6, 3], [0, 0]]
    assert (result[0] == 5).all()


def test_noiseless_choice_keeps_the_surest():
    _, trace = traced(network(), torch.full((3, 64), MASK), choice_temperature=0, seeds=range(3))
    for step in trace[:-1]:
        for mask, confidence in zip(step.mask, step.confidence, strict=True):
            assert confidence[mask].max() <= confidence[~mask].min()


def test_seed_names_an_image():
    """Neither the order nor the size of the batch changes an image; the seed does."""
    tokens, seeds = images([24, 10, 0, 24, 17], 24), torch.tensor([9, 8, 7, 6, 5])
    together = decode(network(), tokens, MASK, seeds=seeds)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(decode(network(), tokens[order], MASK, seeds=seeds[order]), together[order])
    for i in range(5):
        alone = decode(network(), tokens[i : i + 1], MASK, seeds=[int(seeds[i])])
        assert torch.equal(alone, together[i : i + 1])
    blank = torch.full((64, 24), MASK)
    assert len(decode(network(), blank, MASK, seeds=range(64)).unique(dim=0)) == 64
    assert len(decode(network(), blank, MASK, seeds=[1] * 64).unique(dim=0)) == 1


def test_without_seeds_torch_decides():
    blank = torch.full((2, 24), MASK)
    torch.manual_seed(0)
    first = decode(network(), blank, MASK)
    second = decode(network(), blank, MASK)
    torch.manual_seed(0)
    assert torch.equal(decode(network(), blank, MASK), first)
    assert not torch.equal(first, second)


def test_nothing_reads_a_value():
    """No operation needs a tensor's values on the host, nor to know a shape: a GPU would wait."""
    blank, waiting = torch.full((2, 24), MASK), {"aten::_local_scalar_dense", "aten::nonzero"}
    with torch.autograd.profiler.profile() as profile:
        for filters in {}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}:
            decode(flat, blank, MASK, seeds=torch.arange(2), **filters)
    names = {event.name for event in profile.function_events}
    assert "aten::sort" in names and not names & waiting
    with torch.autograd.profiler.profile() as profile:
        blank[blank.any(-1)].any().item()
    assert {event.name for event in profile.function_events} >= waiting


def test_start_step():
    """The counter begins late: fewer calls, more settled at the first, counted from the unknown."""
    tokens = images([16, 12], 24)
    _, trace = traced(network(), tokens, steps=12, start_step=6, schedule="linear")
    assert [step.step for step in trace] == [6, 7, 8, 9, 10, 11]
    assert [step.mask.sum(-1).tolist() for step in trace] == [
        [math.floor(u * (12 - t) / 12 + 1e-6) for u in (16, 12)] for t in range(7, 13)
    ]


def test_bad_logits_leave_known_tokens():
    tokens = images([12, 7], 24)
    result = decode(lambda t, r: torch.full((2, 24, K), math.nan), tokens, MASK)
    assert torch.equal(result[tokens != MASK], tokens[tokens != MASK])
    assert (result != MASK).all()


def test_annealed_temperature_is_linear_in_progress():
    function, blank = network(), torch.full((4, 64), MASK)
    annealed = decode(function, blank, MASK, temperature=(2.0, 0.5), seeds=range(4))
    by_hand = decode(lambda t, r: function(t, r) / (2 - 1.5 * r), blank, MASK, seeds=range(4))
    assert torch.equal(annealed, by_hand)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"steps": 0}, "steps is 0"),
        ({"start_step": 8}, "start step 8 is not one of the steps 0 to 7"),
        ({"start_step": -1}, "start step -1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": (1.0, -0.5)}, "temperature is"),
        ({"temperature": (1.0, float("nan"))}, "temperature is"),
        ({"choice_temperature": -3.0}, "choice temperature is -3.0"),
        ({"choice_temperature": float("nan")}, "choice temperature is nan"),
        ({"top_k": 0}, "top-k is 0"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"seeds": [1]}, "one seed for each image"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'"),
    ],
)
def test_settings_out_of_range(wrong, told):
    with pytest.raises(UserError, match=told):
        decode(flat, torch.full((2, 8), MASK), MASK, **wrong)


def squares(tokens):
    """A tokenizer of a 2 x 3 grid of squares of 4 pixels, as bright as the token is high."""
    return (
        (tokens.view(-1, 1, 2, 3) / K)
        .expand(-1, 3, -1, -1)
        .repeat_interleave(4, dim=2)
        .repeat_interleave(4, dim=3)
    )


def test_trace_pictures(tmp_path):
    tokens = torch.tensor([[MASK] * 6, [1, 2, MASK, MASK, MASK, 6]])
    result, steps = traced(network(), tokens, steps=4, seeds=[0, 1])
    pictures = frames(steps, squares)
    assert pictures.shape == (4, 2, 3, 8, 12)
    assert torch.equal(pictures[-1], squares(result))
    for step, picture in zip(steps, pictures, strict=True):
        grey = picture[:, 0, ::4, ::4].flatten(1) == torch.tensor(0.6)
        assert torch.equal(grey, step.mask)
        assert torch.equal(picture[:, 0, ::4, ::4].flatten(1)[~grey], (result / K)[~grey])

    sheet = strip(steps, squares)
    assert sheet.size == (4 * (12 + GAP) - GAP, 2 * (8 + GAP) - GAP)
    path = tmp_path / "trace.gif"
    save_gif(path, steps, squares)
    assert list(tmp_path.iterdir()) == [path]
    with Image.open(path) as animation:
        assert animation.n_frames == 4 and animation.size == (2 * (12 + GAP) - GAP, 8)
        animation.seek(3)
        assert animation.info["duration"] == AT_THE_END
