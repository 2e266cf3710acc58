"""What looks wrong in the numbers that a run logs. It sees floats alone, so it never waits on a
device; each rule warns once.

    watch = Watch(Stays("loss", "nothing is learnt: lower train.lr", low=6.88), Falls("usage", ...))
    for warning in watch(step, values): ...
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class Rule(Protocol):
    name: str  # of the value that it looks at
    since: int  # what is logged up to this step does not count

    def __call__(self, step: int, value: float) -> str | None:
        """What is wrong now, if anything is; steps come in order."""
        ...

    def forget(self) -> None:
        """Start anew, as nothing seen so far counts."""
        ...


@dataclass
class Stays:
    """The value has been from `low` to `high` on the mean of the last `steps` steps."""

    name: str
    advice: str  # what that means, and what to do about it
    low: float = -math.inf
    high: float = math.inf
    steps: int = 1000
    since: int = 0
    seen: deque[tuple[int, float]] = field(default_factory=deque, init=False)

    def __call__(self, step: int, value: float) -> str | None:
        self.seen.append((step, value))
        if step - self.seen[0][0] < self.steps:
            return None
        mean = math.fsum(v for _, v in self.seen) / len(self.seen)
        while step - self.seen[0][0] >= self.steps:
            self.seen.popleft()
        if not self.low <= mean <= self.high:
            return None
        return f"{self.name} was {mean:.3g} over the last {self.steps} steps: {self.advice}"

    def forget(self) -> None:
        self.seen.clear()


@dataclass
class Falls:
    """The value has been below `share` of the largest one before it, `times` times in a row."""

    name: str
    advice: str  # what that means, and what to do about it
    share: float = 0.8
    times: int = 2
    since: int = 0
    largest: float = field(default=0.0, init=False)
    low: int = field(default=0, init=False)

    def __call__(self, step: int, value: float) -> str | None:
        self.largest = max(self.largest, value)
        self.low = self.low + 1 if value < self.share * self.largest else 0
        if self.low < self.times:
            return None
        return f"{self.name} fell from {self.largest:.3g} to {value:.3g}: {self.advice}"

    def forget(self) -> None:
        self.largest, self.low = 0.0, 0


class Watch:
    """Warnings from all of a run's logged values, in the order of its steps."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = list(rules)
        self.lr = 0.0

    def __call__(self, step: int, values: Mapping[str, float]) -> Iterator[str]:
        """What is wrong as of the values that one line of the log has.

        While the learning rate ("lr") rises, nothing that a run shows counts.
        """
        lr = values.get("lr", self.lr)
        rising, self.lr = lr > self.lr, lr
        warnings = []
        for rule in list(self.rules):
            if rising or step <= rule.since:
                rule.forget()
            elif rule.name in values and (found := rule(step, values[rule.name])):
                self.rules.remove(rule)
                warnings.append(f"step {step}: {found}")
        return iter(warnings)
