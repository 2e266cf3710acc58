"""In which order the positions of an image are settled, where confidence is not to decide it.

An order is a function of (grid (h, w), seeds of the images): for `decode`, positions int64 (N,) for
all images or (B, N) for each; None lets confidence decide.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import count

import torch
from torch import Tensor

from maskgit.common import noise

Order = Callable[[Sequence[int], Sequence[int]], Tensor | None]


def halton(h: int, w: int) -> Tensor:
    """The positions of an h x w grid, row-major, int64 (h * w,), as the Halton sequence visits
    them first.

    Besnier et al. 2025 (Halton-MaskGIT), section 3: its points, base 2 downwards and base 3 across,
    lie evenly over the image however many there are, so that tokens settled at one step are far
    apart.
    """
    return torch.tensor(_halton(h, w))


@cache
def _halton(h: int, w: int) -> tuple[int, ...]:
    visited: dict[int, None] = {}  # a set that keeps its order
    for index in count(1):
        if len(visited) == h * w:
            return tuple(visited)
        (y, rows), (x, columns) = _mirrored(index, 2), _mirrored(index, 3)
        visited[h * y // rows * w + w * x // columns] = None
    raise AssertionError  # the count has no end


def _mirrored(index: int, base: int) -> tuple[int, int]:
    """The digits of `index` mirrored at the point, 0.d0d1d2..., as a fraction: exact, so that no
    rounding moves a point to another cell."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator, denominator


def rolled(order: Tensor, seeds: Sequence[int]) -> Tensor:
    """An order (N,) begun somewhere else for each image, by its seed: int64 (B, N)."""
    n = len(order)
    start = noise.uniform(torch.tensor(seeds), 0, 1, noise.ORDER).double() * n  # (B, 1)
    return order[(start.long() + torch.arange(n)) % n]


ORDERS: dict[str, Order] = {
    "confidence": lambda grid, seeds: None,
    "halton": lambda grid, seeds: halton(*grid),
    "halton-rolled": lambda grid, seeds: rolled(halton(*grid), seeds),
}
