"""Less memory for a step: batches in parts, and blocks that run again; and what of it processes
share."""

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute

from maskgit.common import UserError
from maskgit.engine.task import Batch, Loss


class Losses(nn.Module):
    """What data-parallel training wraps of a part: the computation of its losses as a whole, so
    that a task may call its networks as often as it likes, and another part's beside."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, compute: Callable[[], Loss]) -> Loss:
        return compute()


def split(batch: Batch, size: int | None) -> list[Batch]:
    """A batch, tensors (B, ...), as batches of at most `size` samples; None: as it is."""
    if size is None:
        return [batch]
    parts = {key: value.split(size) for key, value in batch.items()}
    count = len(next(iter(parts.values())))
    return [{key: value[i] for key, value in parts.items()} for i in range(count)]


def recompute_blocks(module: nn.Module) -> None:
    """Activation checkpointing: the blocks in each list or sequence of a network keep nothing for
    the gradient but their input, and run again when it is computed (Chen et al. 2016)."""
    if any(isinstance(m, _BatchNorm) for m in module.modules()):
        raise UserError("train.activation_checkpointing does not go with a network of BatchNorm")
    blocks = isinstance(module, (nn.ModuleList, nn.Sequential))
    for child in module.children():
        if blocks and any(True for _ in child.children()):
            child.forward = partial(recompute, child.forward, use_reentrant=False)
        else:
            recompute_blocks(child)
