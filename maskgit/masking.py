"""The training mask (Chang et al. 2022, section 3.1): a random share of each image's tokens."""

import torch
from torch import Generator, Tensor

from maskgit.common import pick
from maskgit.schedule import SCHEDULES


def random_mask(
    shape: tuple[int, int],
    schedule: str = "cosine",
    generator: Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Masks for `shape` = (B, N) tokens -> bool (B, N), True = masked, and r, float64 (B,).

    The progress r is uniform in [0, 1). Of an image's tokens round(schedule(r) N) are masked, at
    least one, each set of that size as likely as any other.
    """
    batch, n = shape
    r = torch.rand(batch, dtype=torch.float64, generator=generator, device=device)
    share = pick(SCHEDULES, schedule, "schedule")(r, n)
    count = (share * n).round().clamp(min=1)  # (B,)
    rank = torch.rand(shape, generator=generator, device=device).argsort(-1).argsort(-1)
    return rank < count[:, None], r
