"""Scores of features and of class probabilities. Sets are compared in blocks: no matrix over all
pairs is ever held, so that 50,000 against 50,000 images fit into memory."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from maskgit.common import UserError

KID_SUBSETS, KID_SIZE = 100, 1000
BLOCK = 2048  # images of each set whose pairs are held at once


def inception_score(
    logits: Tensor, splits: int = 10, order: Tensor | None = None
) -> tuple[float, float]:
    """Mean and deviation over splits of exp(E[KL(p(y|x) || p(y))]) (Salimans et al. 2016, 4).

    logits (N, K); order: a permutation of the N images, which the splits are then cut from.
    Raises UserError for fewer images than splits.
    """
    if len(logits) < splits:
        raise UserError(f"{splits} splits need as many images, not {len(logits)}")
    if order is not None:
        logits = logits[order]
    log_p = logits.double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        marginal = part.exp().mean(0, keepdim=True).log()
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose likeliest class is their label; logits (N, K), labels (N,)."""
    return (logits.argmax(1) == labels).double().mean().item()


def kid(
    fake: Tensor, real: Tensor, subsets: int = KID_SUBSETS, size: int = KID_SIZE, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018): mean and deviation over random subsets.

    The unbiased MMD^2 with the kernel (x.y / D + 1)^3; features (N, D) and (M, D). Raises UserError
    where a set is smaller than a subset.
    """
    if min(len(fake), len(real)) < size:
        raise UserError(f"subsets of {size} need as many images, not {min(len(fake), len(real))}")
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = fake[torch.from_numpy(draw.choice(len(fake), size, replace=False))].double()
        y = real[torch.from_numpy(draw.choice(len(real), size, replace=False))].double()
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values))


def cmmd(x: Tensor, y: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """The biased MMD^2 of unit-length features under a Gaussian kernel, times `scale`
    (Jayasumana et al. 2024, CMMD)."""
    x, y = (torch.nn.functional.normalize(z.double(), dim=1) for z in (x, y))

    def mean(a: Tensor, b: Tensor) -> float:
        total = sum(
            torch.exp(-_squared(p, q) / (2 * sigma**2)).sum().item()
            for p in a.split(BLOCK)
            for q in b.split(BLOCK)
        )
        return total / (len(a) * len(b))

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fake images within the reach of a real one, and of real ones within that of a fake
    one; an image reaches as far as its k-th neighbour (Kynkaanniemi et al. 2019, section 2)."""
    near = _within(fake, real, radii(real, k)), _within(real, fake, radii(fake, k))
    precision, recall = ((count > 0).double().mean().item() for count in near)
    return precision, recall


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """How many real reaches a fake image lies in, over k; and the share of real images whose reach
    has a fake one in it (Naeem et al. 2020, section 3)."""
    reach = radii(real, k)
    density = _within(fake, real, reach).double().mean().item() / k
    distances, _ = nearest(real, fake)
    return density, (distances <= reach).double().mean().item()


def nearest(of: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each of (N, D) features the distance (N,) to the nearest of (M, D), and its row (N,)."""
    distances, rows = [], []
    for x, blocks in _blocks(of, among):
        best = torch.full((len(x),), torch.inf, dtype=torch.float64)
        row = torch.zeros(len(x), dtype=torch.long)
        for start, d in blocks:
            value, index = d.min(1)
            closer = value < best
            best, row = best.where(~closer, value), row.where(~closer, index + start)
        distances.append(best)
        rows.append(row)
    return torch.cat(distances), torch.cat(rows)


def radii(features: Tensor, k: int) -> Tensor:
    """(N,) distance of each of (N, D) features to its k-th nearest other one. Raises UserError
    where there are no k others: every reach would be infinite, and every score perfect."""
    if len(features) <= k:
        raise UserError(f"the {k}-th neighbour needs {k + 1} images or more, not {len(features)}")
    found = []
    for x, blocks in _blocks(features, features):
        best = torch.full((len(x), k + 1), torch.inf, dtype=torch.float64)  # itself among them
        for _, d in blocks:
            best = torch.cat([best, d], 1).topk(k + 1, largest=False).values
        found.append(best[:, -1])
    return torch.cat(found)


def _within(points: Tensor, centres: Tensor, reach: Tensor) -> Tensor:
    """(N,) how many of the M centres (M, D) reach each of (N, D) points."""
    counts = []
    for _, blocks in _blocks(points, centres):
        inside = [(d <= reach[start : start + d.shape[1]]).sum(1) for start, d in blocks]
        counts.append(torch.stack(inside).sum(0))
    return torch.cat(counts)


Blocks = Iterator[tuple[int, Tensor]]  # (first row of the second set, distances (b, c))


def _blocks(of: Tensor, among: Tensor) -> Iterator[tuple[Tensor, Blocks]]:
    """Blocks of the first set, each with its distances to all blocks of the second."""
    for x in of.split(BLOCK):
        x = x.double()
        yield (
            x,
            (
                (i, _squared(x, among[i : i + BLOCK].double()).sqrt())
                for i in range(0, len(among), BLOCK)
            ),
        )


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (N, M) of (N, D) and (M, D), float64, so that the product is exact."""
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)
