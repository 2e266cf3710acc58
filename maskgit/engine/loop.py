"""The training loop. It knows devices, optimizers, averages and checkpoints, and no task.

A task gives its `parts` (modules by name, the first of them the model that is averaged and
exported), a `step` that yields one (part, loss, logs) per optimizer update, `validate`, `draw`
and `export`. So the two optimizers of a GAN are two yields, not a special case.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maskgit.common import UserError
from maskgit.common.device import pick_device, pick_dtype
from maskgit.common.progress import meter
from maskgit.engine import checkpoint
from maskgit.engine.ema import EMA
from maskgit.engine.journal import Journal
from maskgit.engine.optim import decay_groups, warmup_cosine

Batch = dict[str, Tensor]


@dataclass
class TrainConfig:
    """How any task is trained. Intervals are in steps; 0 switches one off."""

    steps: int = 1000
    batch_size: int = 32
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.96])
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
    keep_last: int = 2
    device: str = "auto"
    dtype: str = "auto"  # fp32 or bf16, of the forward pass; weights and their updates are fp32
    compile: bool = False  # torch.compile: half a minute at the start, then faster

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "clip", "keep_last"):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name}={getattr(self, name)} must be above 0")
        for name in ("weight_decay", "warmup", "seed", "final_lr"):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name}={getattr(self, name)} must be 0 or more")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in [*self.betas, self.ema]):
            raise UserError(f"train.betas={self.betas} and train.ema={self.ema} must be below 1")


class Task(Protocol):
    parts: dict[str, nn.Module]
    units: dict[str, int]  # what an image counts as, in reported rates: {"images": 1, ...}

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]: ...

    def validate(self, model: Any, batches: Iterable[Batch]) -> dict[str, float]: ...

    def draw(self, model: Any, batch: Batch) -> Tensor: ...

    def export(self, model: Any, folder: Path) -> None: ...


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived; everything is saved."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number


def mixed(seed: int, step: int) -> int:
    """A seed for one step: all that is random in a step follows from it, also after a resume."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) & (2**63 - 1)


def train(
    task: Task,
    batches: Callable[[int], Iterator[Batch]],
    validation: dict[str, Callable[[], Iterable[Batch]]],
    config: TrainConfig,
    run: Path,
    log: Callable[[str], None] = print,
) -> dict[str, float] | None:
    """Train up to `config.steps`, from the newest complete checkpoint of the folder `run` if any.

    `batches(step)` gives the batches from that step on; `validation` names sets, each a function
    that gives the same batches at each call. Writes `metrics.jsonl`, `samples/`, `checkpoints/`,
    TensorBoard's events and, at the end and at each save, `export/`. Returns the last metrics, or
    None if the run had finished before. Raises Stopped after a signal, once all is saved.
    """
    accelerator = make_accelerator(config)
    state = _State(task, config, accelerator, log)
    start = state.resume(run, log)
    if start >= config.steps:
        task.export(state.ema.module, run / "export")  # a kill may have come before it
        return None
    journal = Journal(run, start)
    last: dict[str, float] = {}
    progress = meter(config.steps, "step", done=start)
    with progress as advance, _caught_signals() as stop, closing(journal.board):
        stream = batches(start)
        interval, seconds = [], 0.0
        for step in range(start, config.steps):
            since = time.monotonic()
            batch = {k: v.to(accelerator.device) for k, v in next(stream).items()}
            interval.append(state.update(batch, step))
            seconds += time.monotonic() - since  # of training, without validation and saving
            done = step + 1
            if _due(done, config.log_every, config.steps) or done == config.steps:
                last = averaged(interval)
                rate = len(interval) * config.batch_size / seconds
                last |= {f"{unit}_per_second": n * rate for unit, n in task.units.items()}
                interval, seconds = [], 0.0
                journal.write(done, last)
            advance(note=f"loss {last['loss']:.4f}" if "loss" in last else "")
            if _due(done, config.validate_every, config.steps):
                for name, make in validation.items():
                    scores = task.validate(state.ema.module, _on(make(), accelerator.device))
                    last |= {f"{name}/{k}": v for k, v in scores.items()}
                journal.write(done, {k: v for k, v in last.items() if "/" in k})
                log(f"step {done}: " + _line(last))
            if _due(done, config.save_every, config.steps) or done == config.steps or stop:
                state.save(run, done)
                task.export(state.ema.module, run / "export")
            if _due(done, config.draw_every, config.steps):
                journal.picture(done, task.draw(state.ema.module, batch))
            if stop:
                log(f"stopped by a signal; saved at step {done}")
                raise Stopped(stop[0])
    return last


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device and precision of the forward pass, as the config asks; UserError if it cannot be."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    if dtype == torch.float16:
        raise UserError("train.dtype=fp16 would need loss scaling: take bf16 or fp32")
    if device.index is not None:
        torch.cuda.set_device(device)
    bf16 = dtype == torch.bfloat16
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if bf16 else "no")
    if accelerator.num_processes > 1:
        raise UserError(f"training takes one process, not {accelerator.num_processes}, as yet")
    return accelerator


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: for a processor, a C++ compiler."""
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    return device.type != "cpu" or any(shutil.which(name) for name in compilers)


def averaged(interval: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each logged value over some steps, leaving out those that are not numbers."""
    names = {name: None for logs in interval for name in logs}
    means = {
        name: torch.stack([logs[name].float() for logs in interval if name in logs]).nanmean()
        for name in names
    }
    return {name: float(mean) for name, mean in means.items() if mean == mean}


class _State:
    """Everything that a checkpoint holds: parts, their optimizers, the average."""

    def __init__(
        self, task: Task, config: TrainConfig, accelerator: Accelerator, log: Callable[[str], None]
    ) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        for part in task.parts.values():
            part.to(accelerator.device).train()
        self.optimizers = {
            name: torch.optim.AdamW(
                decay_groups(part, config.weight_decay),
                lr=config.lr,
                betas=(config.betas[0], config.betas[1]),
                fused=True,
            )
            for name, part in task.parts.items()
            if any(p.requires_grad for p in part.parameters())
        }
        self.model = next(iter(task.parts.values()))
        self.ema = EMA(self.model, config.ema)
        if config.compile and can_compile(accelerator.device):
            # The adaptive weight of a GAN walks the graph before `backward` does.
            torch._functorch.config.donated_buffer = False
            for part in task.parts.values():
                part.compile()
        elif config.compile:
            log("no C++ compiler found (CXX, c++, g++, clang++): training goes on uncompiled")

    def update(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One step: each update that the task yields, then the average."""
        config = self.config
        torch.manual_seed(mixed(config.seed, step))
        factor = warmup_cosine(step, config.warmup, config.steps, config.final_lr)
        merged: dict[str, Tensor] = {}
        with self.accelerator.autocast():
            for name, loss, logs in self.task.step(batch, step):
                optimizer = self.optimizers[name]
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * factor
                self.accelerator.backward(loss)
                parameters = [p for p in self.task.parts[name].parameters() if p.requires_grad]
                norm = nn.utils.clip_grad_norm_(parameters, config.clip)
                if not torch.isfinite(norm):
                    ids = batch["index"].tolist() if "index" in batch else "unknown"
                    raise UserError(
                        f"the loss or gradient of {name} is not finite at step {step} (samples "
                        f"{ids}): the last checkpoint is kept; lower train.lr or check the data"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                merged |= {**logs, f"gradient_{name}": norm}
        self.ema.update(self.model, step)
        merged["lr"] = torch.tensor(config.lr * factor)
        return merged

    def save(self, run: Path, step: int) -> None:
        state = {name: part.state_dict() for name, part in self.task.parts.items()}
        state |= {f"optim-{k}": checkpoint.flatten(o) for k, o in self.optimizers.items()}
        state["average"] = self.ema.module.state_dict()
        checkpoint.save(run / "checkpoints", step, state, {}, self.config.keep_last)

    def resume(self, run: Path, log: Callable[[str], None]) -> int:
        """Load the newest complete checkpoint of `run`; returns the step to go on with."""
        found = checkpoint.newest(run / "checkpoints")
        if found is None:
            return 0
        state, manifest, skipped = found
        for why in skipped:
            log(f"checkpoint skipped: {why}")
        for name, part in self.task.parts.items():
            part.load_state_dict(state[name])
        for name, optimizer in self.optimizers.items():
            checkpoint.unflatten(optimizer, state.get(f"optim-{name}", {}))
        self.ema.module.load_state_dict(state["average"])
        log(f"resuming {run} at step {manifest['step']}")
        return manifest["step"]


def _due(done: int, every: int, steps: int) -> bool:
    return every > 0 and (done % every == 0 or done == steps)


def _on(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    for batch in batches:
        yield {k: v.to(device) for k, v in batch.items()}


def _line(values: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.4g}" for k, v in values.items() if not k.startswith("accuracy_"))


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """A list that SIGTERM or SIGINT puts its number into; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
