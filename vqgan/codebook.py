"""What only training needs of a codebook: moving average, k-means start, restarts, entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskgit.common.precision import widen
from maskgit.common.processes import all_gather, all_reduce, broadcast, world


def products(rows: Tensor, codes: Tensor) -> Tensor:
    """Dot products (M, K) in the precision of `rows`, whatever autocast surrounds it."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ codes.T


def assignment(rows: Tensor, ids: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many rows (M, D) went to each code, (K,), and their sums, (K, D)."""
    count = rows.new_zeros(codes).index_add_(0, ids, rows.new_ones(len(ids)))  # no wait for a GPU
    return count, rows.new_zeros(codes, rows.shape[1]).index_add_(0, ids, rows)


class CodebookAverage(nn.Module):
    """Codes as moving averages of their latents (van den Oord et al. 2017, appendix A.1).

    Kept beside the tokenizer while it trains, never in its weights. Codes whose average count
    falls below `threshold` rows a step are dead: `restart` moves them onto latents of the batch.
    """

    count: Tensor
    total: Tensor
    pool: Tensor  # the latest latents seen before there is a codebook, for k-means

    def __init__(
        self, codebook: Tensor, decay: float = 0.99, threshold: float = 0.1, pool: int = 0
    ) -> None:
        super().__init__()
        self.decay, self.threshold = decay, threshold
        codes = widen(codebook.detach())  # its type is that of all that is averaged
        self.register_buffer("pool", codes.new_zeros(pool, codes.shape[1]))
        self.register_buffer("count", codes.new_ones(len(codes)))
        self.register_buffer("total", codes.clone())

    @torch.no_grad()
    def collect(self, rows: Tensor) -> None:
        """Keep the rows (M, D) of one more batch for k-means, the oldest falling out."""
        rows = all_gather(rows)[-len(self.pool) :]
        self.pool.copy_(torch.cat([self.pool[len(rows) :], rows]))

    @torch.no_grad()
    def start(self, codebook: Tensor, centres: Tensor, count: Tensor) -> None:
        """Begin at k-means centres (K, D) with `count` rows a step each; buffers agree with it."""
        codebook.copy_(centres)
        self.count.copy_(count.clamp_min(self.threshold))
        self.total.copy_(centres * self.count[:, None])

    @torch.no_grad()
    def update(self, codebook: Tensor, rows: Tensor, ids: Tensor, move: bool = True) -> None:
        """One step with the latents (M, D) assigned to codes `ids` (M,); sets `codebook` (K, D),
        unless it is learnt by gradient and only counted here (`move` false)."""
        count, total = map(all_reduce, assignment(rows, ids, len(codebook)))
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        if not move:
            return
        mean = self.total / self.count.clamp_min(1e-5)[:, None]
        # A code without rows for so long that its average has run out stays where it is.
        codebook.copy_(torch.where(self.count[:, None] > 1e-5, mean, codebook))

    @torch.no_grad()
    def restart(self, codebook: Tensor, rows: Tensor) -> Tensor:
        """Put dead codes onto random rows, averages included; returns how many were dead.

        A restarted code counts as one row a step, so that it is not dead again at once.
        """
        rows = all_gather(rows)
        dead = self.count < self.threshold  # (K,)
        chosen = broadcast(rows[torch.randint(len(rows), (len(codebook),), device=rows.device)])
        codebook.copy_(torch.where(dead[:, None], chosen, codebook))
        self.total.copy_(torch.where(dead[:, None], chosen, self.total))
        self.count.masked_fill_(dead, 1.0)
        return dead.sum()


@torch.no_grad()
def kmeans(rows: Tensor, k: int, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random rows: centres (k, D) and how many rows (k,) each has.

    `rows` (M, D) holds several batches, M >= k, and is the same in all processes; so is the result.
    A centre that loses all its rows moves to a random one.
    """
    centres = rows[torch.randperm(len(rows), device=rows.device)[:k]]  # (k, D)
    for _ in range(iterations):
        ids = (centres.square().sum(1) - 2 * products(rows, centres)).argmin(1)  # (M,)
        count, total = assignment(rows, ids, k)
        spare = rows[torch.randint(len(rows), (k,), device=rows.device)]
        centres = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], spare)
    return broadcast(centres), broadcast(count)


def entropy_loss(
    rows: Tensor,
    codes: Tensor,
    temperature: float,
    mean: Tensor | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Mean entropy of each row's code distribution less the entropy of their mean, in nats.

    softmax(-|row - code|^2 / temperature) over codes, of rows (M, D) and codes (K, D): low when
    rows are sure of their code and all codes are used (MaskGIT's tokenizer; MAGVIT-v2, section
    3.1). `mean` (K,) is the mean distribution of a batch of which these rows are a part; without
    it, it is theirs and that of the other processes' rows. The value is a mean over rows given
    that, and so are its gradients, which are those of the whole batch's: the derivative of
    p log p is log p + 1, and what a distribution's derivative sums to is 0.
    """
    entropy, own = _distribution(rows, codes, temperature, chunk)
    if mean is None:
        mean = all_reduce(own.detach().clone()) / world()
    return entropy + (own * mean.clamp_min(1e-12).log()).sum()


@torch.no_grad()
def mean_distribution(rows: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """The mean distribution over codes (K,) of the rows (M, D) of all processes."""
    return all_reduce(_distribution(rows, codes, temperature, chunk=4096)[1]) / world()


def _distribution(
    rows: Tensor, codes: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """The mean entropy, scalar, and the mean (K,) of the rows' distributions over codes. Rows go in
    chunks that are recomputed backwards, so memory does not grow with M x K."""

    def part(some: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        squares = some.square().sum(1, keepdim=True) + codes.square().sum(1)
        distance = squares - 2 * products(some, codes)  # (chunk, K)
        log_p = F.log_softmax(-distance / temperature, dim=1)  # (chunk, K)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(0)

    parts = [checkpoint(part, some, codes, use_reentrant=False) for some in rows.split(chunk)]
    entropy = torch.stack([p[0] for p in parts]).sum() / len(rows)
    return entropy, torch.stack([p[1] for p in parts]).sum(0) / len(rows)


def usage(tokens: Tensor, codebook_size: int) -> tuple[float, float]:
    """Share of the codes that occur in `tokens`, and the perplexity of their distribution."""
    count = torch.bincount(tokens.flatten(), minlength=codebook_size).double()
    p = count / count.sum()
    entropy = -(p * p.clamp_min(1e-300).log()).sum()
    return (count > 0).double().mean().item(), entropy.exp().item()
