"""How much is still masked, as a function of progress: each formula of the family, once.

Chang et al. 2022 (MaskGIT), section 3.3, and the arccos of its successors. `schedule(r, n)` is the
share of `n` tokens that is masked at progress `r` in [0, 1]: never rising, 1 at r = 0 (the
exponential: 1 - 1/n), 0 at r = 1. Training draws `r` at random; decoding walks it from 0 to 1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Schedule = Callable[[Any, Any], Any]  # (r, n), numbers or float64 tensors -> the same


def _schedule(formula: Callable[[Tensor, Tensor], Tensor]) -> Schedule:
    """A formula on float64 tensors -> a schedule on numbers or tensors, clipped to [0, 1]."""

    def schedule(r: Any, n: Any) -> Any:
        r, n = (torch.as_tensor(x, dtype=torch.float64) for x in (r, n))
        share = formula(r, n).clamp(0, 1)
        return share if share.ndim else share.item()

    return schedule


SCHEDULES: dict[str, Schedule] = {
    # Concave: few tokens are settled first, when little is known, and many at the end.
    # (The cosine as a sine, so that it ends at 0 exactly: cos(pi r / 2) = sin(pi (1 - r) / 2).)
    "cosine": _schedule(lambda r, n: torch.sin(math.pi / 2 * (1 - r))),
    "arccos": _schedule(lambda r, n: torch.arccos(r) * (2 / math.pi)),
    "halton": _schedule(lambda r, n: _one_more(torch.arccos(r) * (2 / math.pi), n)),
    "square": _schedule(lambda r, n: 1 - r**2),
    "cubic": _schedule(lambda r, n: 1 - r**3),
    "exponential": _schedule(lambda r, n: 1 - n ** (r - 1)),
    # As many at each step.
    "linear": _schedule(lambda r, n: 1 - r),
    # Convex: many first. (The logarithm of one token would be 0 / 0 at the end.)
    "square-root": _schedule(lambda r, n: 1 - r**0.5),
    "logarithmic": _schedule(lambda r, n: -torch.log2(r) / torch.log2(n.clamp(min=2))),
}


def _one_more(share: Tensor, n: Tensor) -> Tensor:
    """`share` of `n` as Halton-MaskGIT's released code counts: it rounds down what is settled, not
    what stays masked. Where that ought to be whole (576 tokens at r = 1/2), its product lies just
    below the whole number, in fp32 and in float64; so one more stays masked there too."""
    count = (share * n + 1e-6).floor() + (share > 0)
    return count / n.clamp(min=1)


def masked_count(share: Any, n: Any) -> Any:
    """How many whole tokens `share` of `n` is: rounded down, in float64.

    The 1e-6 lifts a product that ought to be whole over the rounding error below it, so that all
    platforms count alike. Numbers give an int, tensors an int64 tensor.
    """
    count = torch.as_tensor(share * n + 1e-6, dtype=torch.float64).floor().long()
    return count if count.ndim else int(count)
