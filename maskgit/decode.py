"""Parallel decoding: all masked tokens are guessed at once, and the surest guesses are kept.

Chang et al. 2022 (MaskGIT), section 3.2, as its authors' released code does it. The decoder knows
no model: it calls `tokens_to_logits(tokens, r)`. Generating starts from masks alone, editing from
an image's tokens with some of them masked; it is the same call.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from maskgit.common import UserError, noise, pick
from maskgit.schedule import SCHEDULES, masked_count

TokensToLogits = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, Tensor, Tensor, Tensor], object]


@torch.no_grad()
def decode(
    tokens_to_logits: TokensToLogits,
    tokens: Tensor,
    mask_id: int,
    *,
    steps: int = 8,
    schedule: str = "cosine",
    temperature: float | tuple[float, float] = 1.0,
    choice_temperature: float = 4.5,
    top_k: int | None = None,
    top_p: float | None = None,
    start_step: int = 0,
    order: Tensor | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fill in every `mask_id` of `tokens`, int64 (B, N) -> int64 (B, N). Known tokens stay.

    tokens_to_logits: (tokens (B, N), r) -> logits (B, N, K) over the codebook, those at known
        positions ignored; r = (t + 1) / steps is the progress at step t.
    schedule: a name in SCHEDULES: the share of an image's unknown tokens that stays masked at r.
        At least one is settled at each step, and all are by the last.
    temperature: of the draw of tokens; (start, end) moves linearly with r; 0 takes the likeliest
        token, and its confidence from the logits as they are.
    choice_temperature: of the choice of tokens to keep: the weight, times (1 - r), of the Gumbel
        noise on their log-probability. 0 keeps exactly the likeliest draws.
    top_k, top_p: draw from the k likeliest tokens, from the fewest likely ones that make up p.
    start_step: the step to begin at, for edits that keep more of what was there.
    order: all positions, int64 (N,) or (B, N), from the first to the last to be settled; what is
        known is passed over. None settles the most confident ones first.
    seeds: (B,) ints, one an image; None draws them from torch's generator.
    on_step: called after each step with (t, tokens, mask, confidence), each (B, N): what the next
        step will see, where it is masked, and how sure each draw was (inf where known; by an
        order, minus its place in that).

    Raises UserError for a setting out of range.
    """
    start, end = temperature if isinstance(temperature, Sequence) else (temperature, temperature)
    for fine, rule in (
        (steps >= 1, f"steps is {steps}, but decoding takes at least 1"),
        (
            0 <= start_step < steps,
            f"start step {start_step} is not one of the steps 0 to {steps - 1}",
        ),
        (
            0 <= start < math.inf and 0 <= end < math.inf,
            f"temperature is {temperature}, but must be 0 or more",
        ),
        (
            0 <= choice_temperature < math.inf,
            f"choice temperature is {choice_temperature}, but not below 0",
        ),
        (top_k is None or top_k >= 1, f"top-k is {top_k}, but keeps at least 1 token"),
        (top_p is None or 0 < top_p <= 1, f"top-p is {top_p}, but must be in (0, 1]"),
        (seeds is None or len(seeds) == len(tokens), "there must be one seed for each image"),
        (order is None or order.shape[-1] == tokens.shape[-1], "the order must name all positions"),
    ):
        if not fine:
            raise UserError(rule)

    if seeds is None:
        seeds = torch.randint(2**63 - 1, (len(tokens),))
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=tokens.device)
    mask = tokens == mask_id  # (B, N)
    place = None if order is None else order.to(tokens.device).argsort(-1).float()  # (N) or (B, N)
    counts = masked_counts(mask.sum(-1), schedule, steps, start_step)
    for step, count in zip(range(start_step, steps), counts, strict=True):
        r = (step + 1) / steps
        token_noise, choice_noise = (
            noise.uniform(seeds, step, tokens.shape[1], stream)
            for stream in (noise.TOKEN, noise.CHOICE)
        )
        logits = tokens_to_logits(tokens, r)  # (B, N, K)
        drawn, log_p = draw(logits, token_noise, start + (end - start) * r, top_k, top_p)
        gumbel = -torch.log(-torch.log(choice_noise))
        confidence = log_p + choice_temperature * (1 - r) * gumbel if place is None else -place
        # A logit that is not a number must not outrank what is known.
        confidence = torch.where(mask, confidence.nan_to_num(-math.inf), math.inf)
        tokens = torch.where(mask, drawn, tokens)
        mask = least_confident(confidence, count)
        tokens = tokens.masked_fill(mask, mask_id)
        if on_step is not None:
            on_step(step, tokens, mask, confidence)
    return tokens


def masked_counts(unknown: Tensor, schedule: str, steps: int, start_step: int = 0) -> Tensor:
    """How many tokens of each image stay masked after each step.

    unknown: (B,) int64, how many are masked at the start -> int64 (steps - start_step, B).
    """
    t = torch.arange(start_step, steps, dtype=torch.float64, device=unknown.device)[:, None]
    share = pick(SCHEDULES, schedule, "schedule")((t + 1) / steps, unknown)
    # count[t] = min(masked_count[t], count[t - 1] - 1), for all t at once.
    settled = (t - start_step + 1).long()
    count = (masked_count(share, unknown) + settled).cummin(0).values.minimum(unknown) - settled
    return count.clamp(min=0)


def draw(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a position, by inverting the cumulative distribution at `uniform`.

    logits (B, N, K), uniform (B, N) in (0, 1) -> tokens int64 (B, N), and their log-probability
    under the distribution that they were drawn from, float32 (B, N).
    """
    logits = logits.float() / (temperature or 1.0)
    k, ids = logits.shape[-1], None
    if top_k is not None or top_p is not None:
        k = k if top_k is None else min(top_k, k)
        logits, ids = logits.topk(k)  # (B, N, k), sorted
    probs = logits.softmax(-1)
    cdf = probs.cumsum(-1)
    last = torch.full_like(cdf[..., :1], k - 1, dtype=torch.int64)
    if top_p is not None:
        last = torch.searchsorted(cdf, torch.full_like(cdf[..., :1], top_p)).minimum(last)
    total = cdf.gather(-1, last)  # (B, N, 1)
    if temperature == 0:
        index = logits.argmax(-1, keepdim=True)
    else:
        index = torch.searchsorted(cdf, uniform[..., None] * total).minimum(last)
    log_p = (probs.gather(-1, index) / total).log()
    return (index if ids is None else ids.gather(-1, index)).squeeze(-1), log_p.squeeze(-1)


def least_confident(confidence: Tensor, count: Tensor) -> Tensor:
    """The mask (B, N) of the `count` (B,) least confident positions of each row: exactly so many.

    Among equals the last ones, on every device.
    """
    n = confidence.shape[-1]
    order = confidence.argsort(dim=-1, descending=True, stable=True)  # (B, N)
    masked = torch.arange(n, device=order.device) >= n - count[:, None]
    return torch.zeros_like(masked).scatter(-1, order, masked)
