"""Orders of unmasking, and golden traces of the presets by another implementation."""

import math

import numpy as np
import pytest
import torch
from test_pipeline import NAMES, SIZE, hole, pictures, tiny_transformer, tiny_vqgan

from maskgit.common import UserError, noise
from maskgit.decode import decode
from maskgit.orders import ORDERS, halton, rolled
from maskgit.pipeline import Pipeline
from maskgit.presets import presets_for
from maskgit.trace import recorder

K = 12
MASK = K


def network(n, scale=1.5, seed=0):
    """A random function of a token, its neighbour and its place: logits (B, n, K)."""
    generator = np.random.default_rng(seed)
    own, other = scale * generator.standard_normal((2, n, K + 1, K)).astype(np.float32)

    def function(tokens):
        places = np.arange(n)
        return own[places, tokens] + other[places, np.roll(tokens, 1, -1)]

    return function


def in_torch(function):
    return lambda tokens, r: torch.from_numpy(function(tokens.numpy()))


def images(unknown, n, seed=0):
    """A row of n tokens for each number in `unknown`, with so many of them masked."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(K, size=(len(unknown), n))
    for row, count in zip(rows, unknown, strict=True):
        row[generator.permutation(n)[:count]] = MASK
    return torch.from_numpy(rows)


def traced(function, tokens, **settings):
    steps = []
    return decode(function, tokens, MASK, on_step=recorder(steps), **settings), steps


# ---------------------------------------------------------------- orders


def by_digits(index, base):
    """The van der Corput sequence: the digits of `index` behind the point, the last one first."""
    return sum(
        int(d) * float(base) ** -(1 + i) for i, d in enumerate(np.base_repr(index, base)[::-1])
    )


def straight_halton(side, points=10_000):
    """First visits of the first points to the cells of a square, as (row, column)."""
    cells = [
        (math.floor(side * by_digits(i, 2)), math.floor(side * by_digits(i, 3) + 1e-9))
        for i in range(1, points)
    ]
    return list(dict.fromkeys(cells))


def test_the_first_cells_are_the_published_ones():
    cells = [divmod(position, 16) for position in halton(16, 16).tolist()]
    assert cells[:4] == [(8, 5), (4, 10), (12, 1), (2, 7)]


@pytest.mark.parametrize("side", [16, 24, 32])
def test_the_order_is_the_sequence_s_first_visits(side):
    cells = [divmod(position, side) for position in halton(side, side).tolist()]
    assert cells == straight_halton(side)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (8, 8), (4, 6), (3, 40)])
def test_every_position_comes_once(grid):
    h, w = grid
    assert halton(h, w).sort().values.tolist() == list(range(h * w))


def test_any_beginning_lies_evenly_over_the_image():
    for count in (16, 32, 64):
        rows, columns = halton(16, 16)[:count] // 16, halton(16, 16)[:count] % 16
        quarters = torch.bincount(rows // 8 * 2 + columns // 8, minlength=4)
        assert quarters.max() - quarters.min() <= 2


def test_a_roll_is_named_by_the_seed():
    order = halton(4, 6)
    seeds = list(range(400))
    rolls = rolled(order, seeds)
    assert rolls.shape == (400, 24) and rolls.dtype == torch.int64
    starts = [order.tolist().index(first) for first in rolls[:, 0].tolist()]
    for row, start in zip(rolls.tolist(), starts, strict=True):
        assert row == order.roll(-start).tolist()
    assert set(starts) == set(range(24))
    assert torch.equal(rolled(order, seeds[7:9]), rolls[7:9])
    assert rolled(order, [-(2**63), 2**63 - 1]).shape == (2, 24)


# ---------------------------------------------------------------- decoding by an order


def test_positions_are_settled_in_the_order_given():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    tokens = images([20, 13, 0], 20)
    _, steps = traced(
        in_torch(network(20)), tokens, steps=5, schedule="linear", order=order, seeds=range(3)
    )
    for step, left in zip(steps, (16, 12, 8, 4, 0), strict=True):
        for image, unknown in enumerate((20, 13, 0)):
            own = [p for p in order.tolist() if tokens[image, p] == MASK]
            stay = math.floor(unknown * left / 20 + 1e-6)
            assert step.mask[image].nonzero().flatten().tolist() == sorted(own[unknown - stay :])


def test_each_image_may_have_an_order_of_its_own():
    tokens, function = images([20, 13], 20), in_torch(network(20))
    orders = torch.stack([torch.randperm(20), torch.randperm(20)])
    options = dict(steps=4, seeds=[5, 6])
    together = decode(function, tokens, MASK, order=orders, **options)
    for i in range(2):
        one = slice(i, i + 1)
        alone = decode(function, tokens[one], MASK, order=orders[i], steps=4, seeds=[5 + i])
        assert torch.equal(alone[0], together[i])


def test_an_order_of_another_length_is_refused():
    with pytest.raises(UserError, match="must name all positions"):
        decode(in_torch(network(20)), images([3], 20), MASK, order=torch.arange(19))


def test_known_tokens_stay_and_do_not_count():
    """Unlike in the released code, which draws them again and counts them as settled."""
    unknown = [256, 100, 3, 0]
    tokens = images(unknown, 256)
    result, steps = traced(
        in_torch(network(256)),
        tokens,
        **dict(steps=32, schedule="halton", order=halton(16, 16), seeds=range(4)),
    )
    known = tokens != MASK
    assert torch.equal(result[known], tokens[known]) and result.max() < K
    for step in steps:
        r = (step.step + 1) / 32
        settled = [
            min(n, max(step.step + 1, int(n * (1 - math.acos(r) * 2 / math.pi)))) for n in unknown
        ]
        assert step.mask.sum(-1).tolist() == [
            n - count for n, count in zip(unknown, settled, strict=True)
        ]


# ---------------------------------------------------------------- golden traces of the presets


def softmax(x):
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def drawn(logits, uniform):
    """Tokens (N,) by inverting the cumulative distribution, and their probability."""
    p = softmax(logits)
    ids = (np.cumsum(p, -1) <= uniform[:, None] * p.sum(-1, keepdims=True)).sum(-1)
    return ids, p[np.arange(len(ids)), ids]


def uniforms(seed, step, n):
    """The numbers of the draw and of the choice."""
    streams = (noise.TOKEN, noise.CHOICE)
    return [noise.uniform(torch.tensor([seed]), step, n, s)[0].double().numpy() for s in streams]


def maskgit_trace(function, tokens, seed, steps, choice_temperature, mask=MASK):
    """MaskGIT's decoding of one image (N,), as its released code does it: tokens at each step."""
    unknown = (tokens == mask).sum()
    for t in range(steps):
        r, known = (t + 1) / steps, tokens != mask
        token_noise, choice_noise = uniforms(seed, t, len(tokens))
        ids, p = drawn(function(tokens[None])[0], token_noise)
        ids = np.where(known, tokens, ids)
        score = np.log(p) + choice_temperature * (1 - r) * -np.log(-np.log(choice_noise))
        score = np.where(known, np.inf, score)
        count = math.floor(unknown * math.cos(math.pi / 2 * r) + 1e-9)
        count = max(0, min(count, (~known).sum() - 1))
        tokens = ids.copy()
        tokens[np.argsort(score, kind="stable")[:count]] = mask
        yield tokens


def halton_trace(cond, uncond, tokens, seed, side, steps, w):
    """Halton-MaskGIT's decoding of one image (N,) from blank: tokens at each step."""
    order = [row * side + column for row, column in straight_halton(side)]
    n, settled = side * side, 0
    for i in range(steps):
        upto = max(i + 1, int(n * (1 - np.arccos((i + 1) / steps) * 2 / np.pi)))
        logits = (1 + w) * cond(tokens[None])[0] - w * uncond(tokens[None])[0]
        ids, _ = drawn(logits, uniforms(seed, i, n)[0])
        tokens = tokens.copy()
        tokens[order[settled:upto]] = ids[order[settled:upto]]
        settled = upto
        yield tokens


def assert_traced(steps, expected):
    assert len(steps) == len(expected)
    for step, tokens in zip(steps, expected, strict=True):
        assert step.tokens[0].tolist() == tokens.tolist(), step.step


@pytest.mark.parametrize(("side", "steps"), [(16, 8), (32, 12)])
def test_golden_trace_of_maskgit(side, steps):
    settings = presets_for("official MaskGIT", [side, side])["maskgit"]["settings"]
    n, function = side * side, network(side * side)
    assert settings.pop("order") == "confidence" and settings.pop("guidance") == 0
    assert settings["steps"] == steps
    for unknown, seed in ((n, 3), (n // 5, 4)):
        tokens = images([unknown], n)
        _, trace = traced(in_torch(function), tokens, seeds=[seed], **settings)
        assert_traced(trace, list(maskgit_trace(function, tokens[0].numpy(), seed, steps, 4.5)))


@pytest.mark.parametrize(
    ("size", "side", "w"),
    [("tiny", 16, 1.5), ("small", 16, 1.0), ("base", 16, 0.7), ("large", 24, 0.5)],
)
def test_golden_trace_of_halton(size, side, w):
    settings = presets_for(f"Halton-MaskGIT {size}", [side, side])["halton"]["settings"]
    n = side * side
    cond, uncond = network(n), network(n, seed=1)
    scale, shape = settings.pop("guidance"), settings.pop("guidance_schedule")
    assert shape == "constant"
    order = ORDERS[settings.pop("order")]([side, side], [9])

    def function(tokens, r):
        c, u = (torch.from_numpy(f(tokens.numpy())) for f in (cond, uncond))
        return c + scale * (c - u)

    blank = torch.full((1, n), MASK)
    _, trace = traced(function, blank, seeds=[9], order=order, **settings)
    assert_traced(trace, list(halton_trace(cond, uncond, blank[0].numpy(), 9, side, 32, w)))


# ---------------------------------------------------------------- in a pipeline


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(tiny_vqgan(), tiny_transformer(), NAMES)


def final_tokens(pipe, labels, **options):
    """The tokens of each image, (B, N)."""
    found = []

    def on_step(step, tokens, mask, confidence):
        if not mask.any():
            found.append(tokens)

    pipe.sample(labels, on_step=on_step, **options)
    return torch.cat(found)


@pytest.mark.parametrize("order", ["halton", "halton-rolled"])
def test_a_seed_names_an_image_whatever_the_batch(pipe, order):
    options = dict(order=order, schedule="halton", steps=5, guidance=1.0)
    together = final_tokens(pipe, [0, 1, 2, 3, 0], seed=5, **options)
    assert torch.equal(
        final_tokens(pipe, [0, 1, 2, 3, 0], seed=5, batch_size=2, **options), together
    )
    alone = final_tokens(pipe, [3], seed=8, **options)
    assert torch.equal(alone[0], together[3])
    assert not torch.equal(together, final_tokens(pipe, [0, 1, 2, 3, 0], seed=5, steps=5))


def test_a_rolled_order_begins_elsewhere_for_each_image(pipe):
    first = {"halton": [], "halton-rolled": []}
    for order, masks in first.items():
        options = dict(order=order, steps=24, schedule="linear", seed=0)
        pipe.sample([0] * 8, on_step=lambda s, t, m, c, at=masks: at.append(~m), **options)
        assert [step.sum(-1).tolist() for step in masks[:2]] == [[1] * 8, [2] * 8]
    assert len({mask.nonzero().item() for mask in first["halton"][0]}) == 1
    assert len({mask.nonzero().item() for mask in first["halton-rolled"][0]}) > 3


def test_edits_go_by_an_order_too(pipe):
    image, mask = pictures(*SIZE), hole(*SIZE, top=0, left=0, height=8, width=24)  # two rows of six
    seen = []
    out = pipe.inpaint(
        image,
        mask,
        0,
        **dict(order="halton", steps=12, schedule="linear", dilate=0),
        on_step=lambda step, tokens, mask, confidence: seen.append((tokens.clone(), mask[0])),
    )
    settled = [position for position in halton(4, 6).tolist() if position < 12]
    for i, (_, left) in enumerate(seen):
        assert left.nonzero().flatten().tolist() == sorted(settled[i + 1 :])
    assert all(torch.equal(tokens[0, 12:], seen[0][0][0, 12:]) for tokens, _ in seen)
    assert torch.equal(out[..., 8:, :], image[..., 8:, :])
    with pytest.raises(UserError, match="unknown order 'haltn': did you mean 'halton'"):
        pipe.sample([0], order="haltn")
