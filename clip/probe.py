"""A linear probe: how much of the classes a linear classifier can read from frozen features.

Multinomial logistic regression, as Radford et al. 2021 (appendix A.3) evaluate CLIP: L-BFGS with at
most 1,000 iterations, its regularisation swept on a validation split, then fitted on everything.
Apart from the paper, which takes what comes before the projection, the features here are what the
rest of the evaluation uses: projected and of unit length.

Shapes: N images, D width of the features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit.common import UserError

GRID = tuple(range(-6, 7, 2))  # log10 of the C tried first
FINEST = 0.125  # of log10(C): 8 steps a decade
FIXED_C = 0.316  # where there is nothing to choose C by; the example in OpenAI's README has it
ITERATIONS = 1000
ROUGH = 1e-4  # tolerance of the fits that are only compared, which is scikit-learn's default
ROWS = 65_536  # of which the logits are in memory at a time


@dataclass
class Probe:
    """A linear classifier: logits = features @ weight.T + bias."""

    weight: Tensor  # (K, D) float64
    bias: Tensor  # (K,) float64
    C: float  # inverse strength of the regularisation
    objective: float  # at the solution, see `fit`

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K) float64."""
        return F.linear(features.to(self.weight), self.weight, self.bias)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of (N, D) put into their class, labels (N,)."""
        right = self.logits(features).argmax(1) == labels.to(self.weight.device)
        return float(right.double().mean())


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    C: float,
    start: Probe | None = None,
    tolerance: float = 1e-6,
) -> Probe:
    """The probe that minimises |W|^2 / 2 + C * (sum of the cross-entropies), W without the bias,
    for (N, D) features and (N,) labels in [0, classes).

    scikit-learn's LogisticRegression(C=C) has the same objective. Computed in float64, from `start`
    if given: the objective is convex, so it only saves time. tolerance: of the largest element of
    the mean loss's gradient, with respect to weights in units of their curvature.
    """
    if len(features) == 0 or len(features) != len(labels):
        raise UserError(f"{len(features)} features and {len(labels)} labels make no linear probe")
    labels, dim = labels.to(features.device), features.shape[1]
    # Divided by C * N, the loss is a mean, and one tolerance serves every C and N.
    scale = 1 / (C * len(features))
    # A CLIP's features lie close together. Around their mean, and with weights in units of about
    # their curvature, the problem is far better conditioned, and has the same solution: the bias,
    # which is free, takes up the difference.
    mean = features.mean(0, dtype=torch.float64)  # (D,)
    unit = (features.var(0, correction=0).double() + scale).sqrt()  # (D,)
    theta = torch.zeros(classes, dim + 1, dtype=torch.float64, device=features.device)
    if start is not None:
        bias = start.bias + start.weight @ mean
        theta.copy_(torch.cat([start.weight * unit, bias[:, None]], 1))
    theta.requires_grad_()

    @torch.no_grad()
    def closure() -> Tensor:
        weight, bias = theta[:, :dim] / unit, theta[:, dim]
        gradient = torch.zeros_like(theta)
        loss = theta.new_zeros(())
        for i in range(0, len(features), ROWS):
            x, y = features[i : i + ROWS].to(theta) - mean, labels[i : i + ROWS, None]
            log_p = F.linear(x, weight, bias).log_softmax(1)  # (n, K)
            loss -= log_p.gather(1, y).sum()
            error = log_p.exp_().scatter_add_(1, y, theta.new_full((1, 1), -1.0).expand_as(y))
            gradient[:, :dim] += error.T @ x
            gradient[:, dim] += error.sum(0)
        gradient /= len(features)
        gradient[:, :dim] = (gradient[:, :dim] + scale * weight) / unit
        theta.grad = gradient
        return loss / len(features) + scale / 2 * weight.square().sum()

    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[arg-type]
    loss = float(closure()) / scale
    weight, bias = theta.detach()[:, :dim] / unit, theta.detach()[:, dim]
    return Probe(weight, bias - weight @ mean, C, loss)


def sweep(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    classes: int,
    grid: Sequence[float] = GRID,
    on_fit: Callable[[], object] = lambda: None,
) -> tuple[float, dict[float, float]]:
    """The C that does best on `validation`, and the accuracy there for each C tried.

    train, validation: features (N, D) and labels (N,). From the `grid` of log10(C) on, the interval
    around the best is halved until it is an eighth of a decade. Of equally good C, the one with the
    lower cross-entropy on the validation split. on_fit: called after each.
    """
    scores: dict[float, tuple[float, float]] = {}
    tried: dict[float, float] = {}
    last: Probe | None = None

    def attempt(exponent: float) -> None:
        nonlocal last
        last = fit(*train, classes, 10.0**exponent, last, ROUGH)
        logits, labels = last.logits(validation[0]), validation[1].to(train[0].device)
        accuracy = float((logits.argmax(1) == labels).double().mean())
        scores[exponent] = accuracy, -float(F.cross_entropy(logits, labels))
        tried[10.0**exponent] = accuracy
        on_fit()

    for exponent in grid:
        attempt(exponent)
    step = (grid[1] - grid[0]) / 2 if len(grid) > 1 else 0
    while step >= FINEST:
        middle = max(scores, key=scores.__getitem__)
        for exponent in (middle - step, middle + step):
            if exponent not in scores and grid[0] <= exponent <= grid[-1]:
                attempt(exponent)
        step /= 2
    return 10.0 ** max(scores, key=scores.__getitem__), dict(sorted(tried.items()))


def split(labels: Tensor, share: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to validate on: of each class, `share` of its images drawn by
    `seed`, rounded, but never all of them."""
    train, validation = [], []
    for rows in _shuffled(labels, seed):
        held = min(round(share * len(rows)), len(rows) - 1)
        validation.append(rows[:held])
        train.append(rows[held:])
    return torch.cat(train).sort().values, torch.cat(validation).sort().values


def shots(labels: Tensor, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of k images of each class drawn by `seed`, and of up to min(k, 4) others to choose C by.

    A class with fewer gives all it has for training. The draw of a smaller k is part of that of a
    larger one, so that a curve over k shows what more images do.
    """
    drawn, others = [], []
    for rows in _shuffled(labels, seed):
        drawn.append(rows[:k])
        others.append(rows[k : k + min(k, 4)])
    return torch.cat(drawn).sort().values, torch.cat(others).sort().values


def _shuffled(labels: Tensor, seed: int) -> list[Tensor]:
    """The rows of each class that has any, each class in a random order of its own."""
    labels = labels.cpu()
    found = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0].numpy()
        found.append(torch.from_numpy(np.random.default_rng([seed, label]).permutation(rows)))
    return found


def linear_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    seed: int = 0,
    on_fit: Callable[[], object] = lambda: None,
) -> tuple[Probe, dict[float, float]]:
    """Sweep C on a fifth of (N, D) features and labels (N,), then fit all of them with it: the
    probe, and the validation accuracy for each C. on_fit: called after each fit of the sweep.

    Raises UserError where no class has 3 images, of which one could be spared.
    """
    train, held = split(labels, seed=seed)
    if len(held) == 0:
        raise UserError("a linear probe needs classes of 3 or more images, to choose C by some")
    parts = [(features[rows], labels[rows]) for rows in (train, held)]
    best, tried = sweep(parts[0], parts[1], classes, on_fit=on_fit)
    return fit(features, labels, classes, best), tried


def few_shot(
    features: Tensor, labels: Tensor, classes: int, k: int, seed: int = 0
) -> tuple[Probe, int]:
    """A probe fitted on k images a class, C swept on up to 4 more a class (`shots`), and how many
    images it was fitted on. Where no class has more than k images, C is `FIXED_C`."""
    drawn, others = shots(labels, k, seed)
    train = features[drawn], labels[drawn]
    best = FIXED_C
    if len(others):
        best, _ = sweep(train, (features[others], labels[others]), classes)
    return fit(*train, classes, best), len(drawn)
