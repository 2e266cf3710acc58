"""The draw of tokens: its statistics are the softmax's, and its filters cut where they say."""

import math

import pytest
import torch
from test_decode import K

from maskgit.common import noise
from maskgit.decode import draw

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -math.inf, 0.0, 3.0, -2.0])
MANY = noise.uniform(torch.arange(400), 0, 100, noise.TOKEN)


def probabilities(logits, **filters):
    """(K,) -> share of each token among many draws, and the log-probability told with it."""
    tokens, log_p = draw(logits.expand(*MANY.shape, -1), MANY, **filters)
    told = torch.full_like(logits, math.nan)
    told[tokens.flatten()] = log_p.flatten()
    return torch.bincount(tokens.flatten(), minlength=len(logits)) / tokens.numel(), told.exp()


def agrees(observed, expected):
    """Chi-square of the draws against the probabilities, within 4 standard deviations."""
    some = expected > 0
    freedom = int(some.sum()) - 1
    distance = ((observed - expected)[some] ** 2 / expected[some]).sum().item() * MANY.numel()
    assert observed[~some].sum() == 0
    return distance <= freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature):
    observed, told = probabilities(LOGITS, temperature=temperature)
    expected = (LOGITS / temperature).softmax(0)
    assert agrees(observed, expected)
    assert not agrees(observed, (LOGITS / (1.1 * temperature)).softmax(0))
    torch.testing.assert_close(told[observed > 0], expected[observed > 0])


@pytest.mark.parametrize(
    "filters, kept",
    [
        ({"top_k": 3}, [6, 0, 3]),
        ({"top_k": 1}, [6]),
        ({"top_k": 99}, [0, 1, 2, 3, 5, 6, 7]),
        ({"top_p": 0.5}, [6]),  # the first has 0.564 of it
        ({"top_p": 0.6}, [6, 0]),  # the first two 0.772
        ({"top_p": 0.8}, [6, 0, 3]),
        ({"top_p": 1e-9}, [6]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 5, 6, 7]),
        ({"top_k": 3, "top_p": 0.62}, [6]),  # of the three left the first has 0.629
    ],
)
def test_filters(filters, kept):
    expected = torch.zeros(8)
    expected[kept] = LOGITS[kept].softmax(0)
    observed, told = probabilities(LOGITS, **filters)
    assert agrees(observed, expected)
    torch.testing.assert_close(told[observed > 0], expected[observed > 0])


def test_draw_at_the_ends_of_the_interval():
    """No uniform number can reach a token of probability 0."""
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(1, 4, 5)
    ends = torch.tensor([[2.0**-24, 0.5, 0.5 + 2.0**-24, 1 - 2.0**-24]])
    assert draw(logits, ends)[0].tolist() == [[1, 1, 3, 3]]


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(4, 32, K, generator=torch.Generator().manual_seed(0))
    for filters in {}, {"top_k": 3}, {"top_p": 0.5}:
        tokens, log_p = draw(logits, MANY[:4, :32], temperature=0, **filters)
        assert torch.equal(tokens, logits.argmax(-1))
    tokens, log_p = draw(logits, MANY[:4, :32], temperature=0)
    torch.testing.assert_close(log_p, logits.log_softmax(-1).amax(-1))
