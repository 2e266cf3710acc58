"""Contrastive losses, each a function of features.

Features are (B, E), of unit length. With several processes (an initialised `torch.distributed`),
each gives its own B pairs and gets its share of the loss over all of them: the mean of the shares
is the loss of one big batch, and so is, after the averaging over processes that data-parallel
training does anyway, every gradient, that of the scale included.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskgit.common import UserError
from maskgit.common.processes import rank, world

# Of each image the keys (B, M) of all texts that go with it, filled up with -1, and of each text
# its own key (B,), int64: image i and text j belong together where key j is among those of image i.
# So a caption that several images have, or the class of both, makes further positives.
Keys = tuple[Tensor, Tensor]


def info_nce(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    keys: Keys | None = None,
    weight: float = 0.5,
    smoothing: float = 0.0,
) -> Tensor:
    """weight * CE(image -> text) + (1 - weight) * CE(text -> image), in nats.

    CLIP (Radford et al. 2021, figure 3): weight 1/2. ConVIRT (Zhang et al. 2020, equation 4)
    weighs the directions otherwise; ALIGN (Jia et al. 2021) smooths the targets: `smoothing` is
    spread over all pairs evenly.

    scale: by which cosines are multiplied. keys: what belongs together, see `Keys`; None for each
    image and its own text alone. Several positives share the target evenly (UniCL, Yang et al.
    2022, equations 2 and 3).
    """
    check_pairs(image, text)
    images, texts = gather(image), gather(text)  # (B W, E) each, over W processes
    if len(images) < 2:
        raise UserError("a batch of one pair has nothing to contrast: take 2 or more")

    own = own_rows(image)
    forward, backward = (own, own) if keys is None else _shares(keys, own, image.dtype, smoothing)

    def direction(rows: Tensor, columns: Tensor, target: Tensor) -> Tensor:
        rest = smoothing if keys is None else 0.0  # shares have it in them
        return F.cross_entropy(scale * rows @ columns.T, target, label_smoothing=rest)

    there, back = direction(image, texts, forward), direction(text, images, backward)
    return weight * there + (1 - weight) * back


def _shares(keys: Keys, own: Tensor, dtype: torch.dtype, smoothing: float) -> tuple[Tensor, Tensor]:
    """The targets of both directions, (B, B W): positives share evenly what smoothing leaves."""
    both = []
    for positive in positives(keys, own):
        share = positive.to(dtype) / positive.sum(1, keepdim=True)
        both.append(share * (1 - smoothing) + smoothing / share.shape[1])
    return both[0], both[1]


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    keys: Keys | None = None,
) -> Tensor:
    """Sum over all pairs of -log sigmoid(z * (scale * cos + bias)), z = 1 for those that belong
    together and -1 for others, over B (SigLIP, Zhai et al. 2023, equation 1). In nats.

    Each process takes its images with the texts of one process after the other, so that of the
    square of all pairs no more than B x B are in memory. scale, bias, keys: as in `info_nce`; the
    published start is scale 10, bias -10.
    """
    check_pairs(image, text)
    texts = gather(text).split(len(text))
    together = positives(keys, own_rows(image))[0].split(len(text), 1)

    def part(image: Tensor, other: Tensor, sign: Tensor) -> Tensor:
        return -F.logsigmoid(sign * (scale * image @ other.T + bias)).sum() / len(image)

    total = image.new_zeros(())
    for other, positive in zip(texts, together, strict=True):
        sign = 2.0 * positive.to(image.dtype) - 1.0  # (B, B)
        if len(texts) == 1:
            total = total + part(image, other, sign)
        else:
            total = total + checkpoint(part, image, other, sign, use_reentrant=False)
    return total


def positives(keys: Keys | None, own: Tensor) -> tuple[Tensor, Tensor]:
    """What belongs together, bool (B, B W) each: this process's images with all texts, and its
    texts with all images. An image and its own text always do; own: (B,), where that stands."""
    pairs = F.one_hot(own, len(own) * world()).bool()
    if keys is None:
        return pairs, pairs
    owned, caption = keys
    forward = (owned[:, None] == gather(caption)[None, :, None]).any(2)
    backward = (gather(owned)[None] == caption[:, None, None]).any(2)
    return forward | pairs, backward | pairs


def check_pairs(image: Tensor, text: Tensor) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        raise UserError(
            f"features of images {tuple(image.shape)} and of texts {tuple(text.shape)} do not "
            "match: both have to be (B, E)"
        )


def own_rows(rows: Tensor) -> Tensor:
    """Where the (B, ...) of this process stand in what `gather` makes of them: (B,) int64."""
    return torch.arange(len(rows), device=rows.device) + rank() * len(rows)


def gather(tensor: Tensor) -> Tensor:
    """(B, ...) of every process -> (B W, ...) in each, in the order of the processes; with
    gradients, which flow back to the process that a row came from."""
    return _Gather.apply(tensor) if world() > 1 else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(world())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # each process used every row
        return gradient[rank() * ctx.rows :][: ctx.rows]
