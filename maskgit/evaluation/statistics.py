"""Gaussian statistics of features, and the Frechet distance between two of them, in float64."""

import numpy as np
import torch
from torch import Tensor

from maskgit.common import UserError

FIT_POINTS = 15  # subset sizes of the extrapolation (Chong and Forsyth 2020, section 3.2)
ROWS = 4096  # features taken to float64 at once


class Gaussian:
    """Mean and covariance of features, streamed: memory does not grow with their number.

    count; mean (D,) and covariance (D, D) float64, the latter unbiased (over N - 1).
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> "Gaussian":
        """Take in features (B, D). Raises UserError for those that are not finite."""
        bad = int((~features.isfinite().all(1)).sum())
        if bad:
            raise UserError(
                f"features of {bad} of {len(features)} images are not finite: look at these "
                f"images, and at the extractor's weights"
            )
        for rows in features.split(ROWS):
            x = rows.double().cpu()
            mean = x.mean(0)
            x -= mean
            self.scatter.addmm_(x.T, x)
            self._move(mean, len(x))
        return self

    def merge(self, other: "Gaussian") -> "Gaussian":
        """Take in what another has seen, as if seen here (Chan et al. 1979, eq. 2.1)."""
        self.scatter += other.scatter
        if other.count:
            self._move(other.mean, other.count)
        return self

    def _move(self, mean: Tensor, count: int) -> None:
        """Account for the distance between the mean so far and that of `count` more."""
        total = self.count + count
        apart = mean - self.mean
        self.scatter.addr_(apart, apart, alpha=self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Raises UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"{self.count} images have no covariance: take 2 or more")
        return self.scatter / (self.count - 1)


def frechet(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Squared Frechet distance between two Gaussians (Heusel et al. 2017, eq. 6), float64.

    The trace of (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2),
    which is symmetric: singular covariances need no epsilon, and no root is imaginary.
    """
    values, vectors = torch.linalg.eigh(covariance1.double())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # (D, D)
    product = torch.linalg.eigvalsh(root @ covariance2.double() @ root)
    cross = product.clamp_min(0).sqrt().sum()
    shift = (mean1.double() - mean2.double()).square().sum()
    return float(shift + covariance1.trace() + covariance2.trace() - 2 * cross)


def frechet_infinity(
    features: Tensor, reference: tuple[Tensor, Tensor], points: int = FIT_POINTS, seed: int = 0
) -> tuple[float, list[tuple[int, float]]]:
    """The Frechet distance of infinitely many images, and the points (n, distance) of the fit.

    The distances of random subsets of (N, D) features to the mean and covariance of `reference`
    lie on a line over 1 / n; its value at 0 is the answer (Chong and Forsyth 2020). The subsets'
    sizes go from a tenth of N, or D + 1 if that is more, to N. Raises UserError where N leaves no
    two sizes to draw a line through.
    """
    count, dim = features.shape
    if count < dim + 2:
        raise UserError(f"the extrapolation of {dim} features needs over {dim + 1} images: {count}")
    sizes = np.linspace(max(count // 10, dim + 1), count, points).astype(int).tolist()
    draw = np.random.default_rng(seed)
    found = []
    for size in sizes:
        rows = torch.from_numpy(draw.choice(count, size, replace=False))
        gaussian = Gaussian(dim).update(features[rows])
        found.append((size, frechet(gaussian.mean, gaussian.covariance, *reference)))
    inverse = [1 / size for size, _ in found]
    _, intercept = np.polyfit(inverse, [distance for _, distance in found], 1)
    return float(intercept), found
