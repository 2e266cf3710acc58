"""The training mask (Chang et al. 2022, section 3.1): a random share of each image's tokens."""

from torch import Tensor

from maskgit.common import noise, pick
from maskgit.schedule import SCHEDULES


def random_mask(seeds: Tensor, n: int, schedule: str = "cosine") -> tuple[Tensor, Tensor]:
    """Masks for `n` tokens of each image -> bool (B, n), True = masked, and r, float64 (B,).

    seeds: int64 (B,), one for each image; the mask is a function of it alone, whatever else is in
    the batch. The progress r is uniform in [0, 1). Of an image's tokens round(schedule(r) n) are
    masked, at least one, each set of that size as likely as any other.
    """
    r = noise.uniform(seeds, 0, 1, noise.MASK_RATIO)[:, 0].double()  # (B,)
    share = pick(SCHEDULES, schedule, "schedule")(r, n)
    count = (share * n).round().clamp(min=1)  # (B,)
    order = noise.uniform(seeds, 0, n, noise.MASK).argsort(dim=-1, stable=True)  # (B, n)
    return order.argsort(-1) < count[:, None], r
