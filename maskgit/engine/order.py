"""In which order the samples of a data set come, and the seed of each."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# 2^63 over the golden ratio, odd: of all numbers, this one's multiples keep furthest apart.
_APART = 0x4F1BBCDCBFA53E0B


def sample_seeds(seed: int, draws: Sequence[int]) -> Tensor:
    """One seed for each sample of a run: int64 (B,), from 0 to below 2^63.

    seed: the run's. draws: the samples' numbers in the endless stream. Different for different
    draws of a run, and for different runs too as long as seeds differ by less than 2^20 and draws
    stay below 2^40. For `noise.uniform`, which makes of neighbours what has nothing in common.
    """
    return torch.tensor([(seed * _APART + draw) % 2**63 for draw in draws], dtype=torch.int64)


class Order:
    """Which image is sample number `draw` of an endless stream: a function of (seed, draw) alone.

    Each pass over the images is a new permutation. Balanced, each round over the classes is one,
    and each class goes through its own images by permutations of its own.
    """

    def __init__(self, labels: Sequence[int], seed: int, balanced: bool = False):
        self.seed = seed
        groups: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            groups.setdefault(label if balanced else -1, []).append(index)
        self.groups = [np.array(groups[label]) for label in sorted(groups)]
        self._drawn: dict[int, tuple[int, np.ndarray]] = {}

    def __call__(self, draw: int) -> int:
        turn, place = divmod(draw, len(self.groups))
        group = int(self._permutation(-1, len(self.groups), turn)[place])
        members = self.groups[group]
        turn, place = divmod(turn, len(members))
        return int(members[self._permutation(group, len(members), turn)[place]])

    def _permutation(self, group: int, size: int, turn: int) -> np.ndarray:
        """The last one of each group is kept, as draws mostly come one after another."""
        if size == 1:
            return np.zeros(1, dtype=np.int64)
        if group not in self._drawn or self._drawn[group][0] != turn:
            random = np.random.default_rng([self.seed, 1 + group, turn])
            self._drawn[group] = (turn, random.permutation(size))
        return self._drawn[group][1]
