"""What only training needs of a codebook: moving average, k-means start, restarts, entropy."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def all_reduce(x: Tensor) -> Tensor:
    """Sum of `x` over all processes, in place; nothing to do in a single one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """Rows of `x` of all processes, in the order of their ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def broadcast(x: Tensor) -> Tensor:
    """`x` as the first process has it, in place: random choices must be the same in all."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(x, 0)
    return x


def products(rows: Tensor, codes: Tensor) -> Tensor:
    """Dot products (M, K) in the precision of `rows`, whatever autocast surrounds it."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ codes.T


def assignment(rows: Tensor, ids: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many rows (M, D) went to each code, (K,), and their sums, (K, D); over all processes."""
    count = torch.bincount(ids, minlength=codes).to(rows.dtype)
    total = rows.new_zeros(codes, rows.shape[1]).index_add_(0, ids, rows)
    return all_reduce(count), all_reduce(total)


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
        self.register_buffer("pool", torch.zeros(pool, codebook.shape[1]))
        self.register_buffer("count", torch.ones(len(codebook)))
        self.register_buffer("total", codebook.detach().clone().float())

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
        count, total = assignment(rows, ids, len(codebook))
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

    `rows` (M, D) holds several batches, M >= k. A centre that loses all its rows moves to a
    random one.
    """
    centres = broadcast(rows[torch.randperm(len(rows), device=rows.device)[:k]])  # (k, D)
    for _ in range(iterations):
        ids = (centres.square().sum(1) - 2 * products(rows, centres)).argmin(1)  # (M,)
        count, total = assignment(rows, ids, k)
        spare = broadcast(rows[torch.randint(len(rows), (k,), device=rows.device)])
        centres = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], spare)
    return centres, count


def entropy_loss(rows: Tensor, codes: Tensor, temperature: float, chunk: int = 4096) -> Tensor:
    """Mean entropy of each row's code distribution less the entropy of their mean, in nats.

    softmax(-|row - code|^2 / temperature) over codes, of rows (M, D) and codes (K, D): low when
    rows are sure of their code and all codes are used (MaskGIT's tokenizer; MAGVIT-v2, section
    3.1). Rows go in chunks that are recomputed backwards, so memory does not grow with M x K.
    """

    def part(some: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        squares = some.square().sum(1, keepdim=True) + codes.square().sum(1)
        distance = squares - 2 * products(some, codes)  # (chunk, K)
        log_p = F.log_softmax(-distance / temperature, dim=1)  # (chunk, K)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(0)

    parts = [checkpoint(part, some, codes, use_reentrant=False) for some in rows.split(chunk)]
    each = torch.stack([p[0] for p in parts]).sum() / len(rows)
    mean = torch.stack([p[1] for p in parts]).sum(0) / len(rows)  # (K,)
    return each + (mean * mean.clamp_min(1e-12).log()).sum()


def usage(tokens: Tensor, codebook_size: int) -> tuple[float, float]:
    """Share of the codes that occur in `tokens`, and the perplexity of their distribution."""
    count = torch.bincount(tokens.flatten(), minlength=codebook_size).double()
    p = count / count.sum()
    entropy = -(p * p.clamp_min(1e-300).log()).sum()
    return (count > 0).double().mean().item(), entropy.exp().item()
