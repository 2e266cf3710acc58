"""Gaussian statistics of features, and the Frechet distance between two of them, in float64."""

import numpy as np
import torch
from torch import Tensor

from maskgit.common import UserError

POINTS = 15  # subset sizes of the extrapolation (Chong and Forsyth 2020, section 3.2)


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
        some = Gaussian(len(self.mean))
        x = features.double().cpu()
        some.count, some.mean = len(x), x.mean(0)
        centred = x - some.mean
        some.scatter = centred.T @ centred
        return self.merge(some)

    def merge(self, other: "Gaussian") -> "Gaussian":
        """Take in what another has seen, as if seen here (Chan et al. 1979, eq. 2.1)."""
        total = self.count + other.count
        if other.count:
            apart = other.mean - self.mean
            weight = self.count * other.count / total
            self.scatter = self.scatter + other.scatter + weight * torch.outer(apart, apart)
            self.mean = self.mean + apart * (other.count / total)
            self.count = total
        return self

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
    features: Tensor, reference: tuple[Tensor, Tensor], points: int = POINTS, seed: int = 0
) -> tuple[float, list[tuple[int, float]]]:
    """The Frechet distance of infinitely many images, and the points (n, distance) of the fit.

    The distances of random subsets of (N, D) features to the mean and covariance of `reference`
    lie on a line over 1 / n; its value at 0 is the answer (Chong and Forsyth 2020). The subsets'
    sizes go from a tenth of N, or D + 1 if that is more, to N.
    """
    count, dim = features.shape
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
