"""What the engine asks of a task and of a config, and all that it knows of either."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from maskgit.common import UserError

Batch = dict[str, Tensor]
# Of each logged value its mean over a micro-batch, or a sum and what it is to be divided by.
Logs = dict[str, Tensor | tuple[Tensor | float, Tensor | float]]
Loss = tuple[Tensor, Tensor | float, Logs]  # a mean over something, how much of it there was, logs


class Task(Protocol):
    """A model that learns: the tokenizer, the transformer, CLIP, the classifier."""

    parts: dict[str, nn.Module]  # the first is the model that is averaged, validated and exported
    units: dict[str, int]  # what an image counts as, in reported rates: {"images": 1, ...}

    @property
    def best(self) -> tuple[str, Callable[..., float]]:
        """Which checkpoint is best, by a score on held-out data: ("heldout/loss", min)."""
        ...

    @property
    def watch(self) -> Callable[[int, dict[str, float]], Iterator[str]]:
        """What in a step's logged values looks wrong, and what to do about it."""
        ...

    def step(
        self, batches: list[Batch], step: int
    ) -> Iterator[tuple[str, Sequence[Callable[[], Loss]]]]:
        """The updates of one step on a batch that comes in micro-batches: of each the part that it
        updates and what computes its losses, most often one for each micro-batch.

        The engine calls these one after the other, each with its gradient before the next, and
        weighs them, so that micro-batches and processes make no difference to the sum. What
        follows a yield runs after the update.
        """
        ...

    def validate(self, model: Any, batches: Iterable[Batch]) -> dict[str, float]: ...

    def draw(self, model: Any, batch: Batch) -> Tensor: ...

    def export(self, model: Any, folder: Path) -> None: ...


@dataclass
class TrainConfig:
    """How any task is trained. Intervals are in steps; 0 switches one off."""

    steps: int = 1000
    batch_size: int = 32  # images of a step, over all processes
    micro_batch: int | None = None  # of a process's share so many at a time: gradients accumulate
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.96])
    eps: float = 1e-8
    weight_decay: float = 0.045
    warmup: int = 100
    final_lr: float = 0.0  # share of `lr` that is left at the last step
    clip: float = 1.0  # largest norm of each part's gradient
    ema: float = 0.999
    seed: int = 0
    log_every: int = 50
    validate_every: int = 500
    draw_every: int = 500
    save_every: int = 500
    save_minutes: float = 10.0  # save as well when the last time was longer ago; 0: never so
    keep_last: int = 2
    keep_best: bool = False  # keep also the checkpoint that is best on held-out data, and `best/`
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # accelerate's, by name
    device: str = "auto"
    dtype: str = "auto"  # fp32 or bf16, of the forward pass; weights and their updates are fp32
    compile: bool = False  # torch.compile: half a minute at the start, then faster
    activation_checkpointing: bool = False  # blocks run twice, and their activations need no memory

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "eps", "clip", "keep_last"):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name}={getattr(self, name)} must be above 0")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"train.micro_batch={self.micro_batch} must be 1 or more, or null")
        for name in ("weight_decay", "warmup", "seed", "final_lr", "save_minutes"):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name}={getattr(self, name)} must be 0 or more")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in [*self.betas, self.ema]):
            raise UserError(f"train.betas={self.betas} and train.ema={self.ema} must be below 1")
