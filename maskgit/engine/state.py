"""What a run has learnt so far, and one step of learning more."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from maskgit.common.device import can_compile
from maskgit.common.folder import PARTIAL, check_space
from maskgit.common.processes import all_reduce, gather_objects, on_main, rank, stop_all, world
from maskgit.engine import checkpoint
from maskgit.engine.ema import EMA
from maskgit.engine.micro import Losses, recompute_blocks, split
from maskgit.engine.optim import clipped, decay_groups, warmup_cosine
from maskgit.engine.speed import flops_of
from maskgit.engine.task import Batch, Logs, Loss, Task, TrainConfig

FLOPS = "flops"  # the name under which a step's are logged, until they become a rate


def mixed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for one step: all that is random in a step follows from it, also after a resume."""
    number = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    return (number + 1) & (2**63 - 1)


class Notes(NamedTuple):
    """What a step has to say, as tensors that the host has not waited for."""

    step: int
    parts: list[str]
    flags: Tensor  # of each part 1 where its update was not finite; then 1 to save, 1 to stop
    ready: Any  # the event after which they are on the host, None where they always are
    sound: Tensor  # whether all losses of this process were finite
    samples: list[int] | str


class State:
    """Everything that a checkpoint holds: parts, their optimizers, the average."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        accelerator: Accelerator,
        log: Callable[[str], None],
        source: dict[str, str] | None = None,
    ) -> None:
        """source: hashes of what is learnt from, to be the same when a run goes on."""
        self.source = source or {}
        self.task, self.config, self.accelerator = task, config, accelerator
        for part in task.parts.values():
            part.to(accelerator.device).train()
        trained = {
            name: part
            for name, part in task.parts.items()
            if any(p.requires_grad for p in part.parameters())
        }
        self.optimizers = {
            name: torch.optim.AdamW(
                decay_groups(part, config.weight_decay),
                lr=config.lr,
                betas=(config.betas[0], config.betas[1]),
                eps=config.eps,
                fused=True,
            )
            for name, part in trained.items()
        }
        self.model = next(iter(task.parts.values()))
        self.ema = EMA(self.model, config.ema)
        if config.activation_checkpointing:
            for part in trained.values():
                recompute_blocks(part)
        if config.compile and can_compile(accelerator.device):
            # The adaptive weight of a GAN walks the graph before `backward` does.
            torch._functorch.config.donated_buffer = False
            for part in trained.values():
                part.compile()
        elif config.compile:
            log("no C++ compiler found (CXX, c++, g++, clang++): training goes on uncompiled")
        self.losses = {
            name: accelerator.prepare_model(Losses(part)) for name, part in trained.items()
        }
        self.start = 0  # the step that this process went on from
        self.totals: dict[tuple[str, ...], Tensor] = {}  # logged since they were last asked for

    def update(self, batch: Batch, step: int, save: bool = False, stop: bool = False) -> Notes:
        """One step on this process's share of a batch: each update of the task, then the average.

        save, stop: what this process wants. The notes say, a moment later, what all want.
        """
        config, device = self.config, self.accelerator.device
        torch.manual_seed(mixed(config.seed, step, rank()))
        micro = [self.on_device(part) for part in split(batch, config.micro_batch)]
        factor = warmup_cosine(step, config.warmup, config.steps, config.final_lr)
        names, flags = [], []
        sound = torch.ones((), dtype=torch.bool, device=device)
        for name, computations in self.updates(micro, step):
            for group in self.optimizers[name].param_groups:
                group["lr"] = config.lr * factor
            norm, finite = self.descend(name, computations)
            names.append(name)
            flags.append((~norm.isfinite()).float())
            sound &= finite
        self.ema.update(self.model, step)
        self.note({"lr": (config.lr * factor, 1.0)}, 1.0)
        flags += [torch.full((), float(wish), device=device) for wish in (save, stop)]
        together = all_reduce(torch.stack(flags)).to("cpu", non_blocking=True)
        ready = torch.cuda.Event() if device.type == "cuda" else None
        if ready:
            ready.record()
        samples = batch["index"].tolist() if "index" in batch else "unknown"
        return Notes(step, names, together, ready, sound, samples)

    def counted(self, batch: Batch, step: int, save: bool = False, stop: bool = False) -> Notes:
        """The same as `update`, and its FLOPs, of all processes, are logged."""
        compiled = self.config.compile
        notes, flops = flops_of(lambda: self.update(batch, step, save, stop), compiled)
        self.note({FLOPS: (flops, 1 / world())}, 1.0)  # the mean is over steps, not processes
        return notes

    def updates(self, micro: list[Batch], step: int) -> Iterator[tuple[str, Any]]:
        """Those of the task, with what it computes between them in the forward pass's precision."""
        updates = self.task.step(micro, step)
        while True:
            with self.accelerator.autocast():
                update = next(updates, None)
            if update is None:
                return
            yield update

    def descend(self, name: str, computations: Sequence[Callable[[], Loss]]) -> tuple[Tensor, ...]:
        """One update of a part: the norm of its gradient, and whether all losses were finite.

        Where the norm is not finite, the optimizer leaves everything as it is.
        """
        losses, optimizer = self.losses[name], self.optimizers[name]
        device = self.accelerator.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device)
        for place, compute in enumerate(computations, 1):
            last = place == len(computations)  # processes share their gradients then, all at once
            with nullcontext() if last else self.accelerator.no_sync(losses):
                loss, weight, logs = losses(compute)
                (loss * weight).backward()
            total = total + weight + 0 * loss.detach()  # so that what is not finite is so in all
            finite &= loss.detach().isfinite()
            self.note(logs, weight)
        # Gradients are sums over micro-batches and means over processes of loss * weight.
        scale = world() / all_reduce(total)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm, factor = clipped(gradients, scale, self.config.clip)
        # The optimizer's own pass over the gradients divides them; what it divides by is fp32.
        optimizer.grad_scale = factor.reciprocal().float()  # type: ignore[attr-defined]
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.note({f"gradient_{name}": norm}, 1.0)
        return norm, finite

    def note(self, logs: Logs, weight: Tensor | float) -> None:
        """Add what was logged to what was before, without waiting for the device."""
        if not logs:
            return
        pairs = [v if isinstance(v, tuple) else (v * weight, weight) for v in logs.values()]
        like = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        flat = [
            x.detach().to(like) if isinstance(x, Tensor) else torch.full_like(like, x)
            for pair in pairs
            for x in pair
        ]
        stacked = torch.stack(flat).view(-1, 2)  # (names, 2)
        names = tuple(logs)
        self.totals[names] = self.totals[names] + stacked if names in self.totals else stacked

    def logged(self) -> dict[str, float]:
        """The mean, over all processes, of each value logged since the last time."""
        means: dict[str, float] = {}
        for names, pairs in self.totals.items():
            for name, (total, count) in zip(names, all_reduce(pairs).tolist(), strict=True):
                if count > 0:
                    means[name] = total / count
        self.totals = {}
        return means

    def heed(self, notes: Notes) -> set[str]:
        """Wait for a step's notes, and do what any process wishes: "save", "stop". UserError, in
        all of them at once, where an update was not finite; nothing has learnt from it."""
        if notes.ready:
            notes.ready.synchronize()
        *bad, save, stop = notes.flags.tolist()
        if any(bad):
            shares = gather_objects((bool(notes.sound), notes.samples))
            guilty = [samples for sound, samples in shares if not sound] or [s for _, s in shares]
            listed = ", ".join(str(samples) for samples in guilty)
            which = notes.parts[[flag > 0 for flag in bad].index(True)]
            stop_all(
                f"the loss or gradient of {which} is not finite at step {notes.step} (samples "
                f"{listed}): the last checkpoint is kept; lower train.lr or check the data"
            )
        return {wish for wish, votes in (("save", save), ("stop", stop)) if votes}

    def on_device(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        return {k: v.to(device, non_blocking=True) for k, v in batch.items()}

    @property
    def size(self) -> int:
        """Bytes of a checkpoint: weights, two moments of each that learns, the average."""
        parts = self.task.parts.values()
        tensors = [t for m in (*parts, self.ema.module) for t in m.state_dict().values()]
        moments = [p for part in parts for p in part.parameters() if p.requires_grad] * 2
        return sum(t.numel() * t.element_size() for t in [*tensors, *moments])

    def save(self, run: Path, step: int, score: float | None = None) -> None:
        """Called in all processes; the main one writes. score: on held-out data, for keep_best."""

        meta = {"processes": world(), "score": score, "source": self.source}

        def write() -> None:
            check_space(run, self.size, "a checkpoint takes")
            state = {name: part.state_dict() for name, part in self.task.parts.items()}
            state |= {f"optim-{k}": checkpoint.flatten(o) for k, o in self.optimizers.items()}
            state["average"] = self.ema.module.state_dict()
            best = self.task.best[1] if self.config.keep_best else None
            checkpoint.save(run / "checkpoints", step, state, meta, self.config.keep_last, best)
            self.export(run / "export")

        on_main(write)

    def export(self, folder: Path) -> None:
        """Write the averaged model into a folder that is, from its first moment on, whole."""
        target = folder if folder.exists() else folder.with_name(f"{PARTIAL}{folder.name}")
        try:
            self.task.export(self.ema.module, target)
            target.rename(folder)  # onto itself, where there is one
        except OSError:
            if target != folder:
                shutil.rmtree(target, ignore_errors=True)
            raise

    def is_best(self, run: Path, score: float | None) -> bool:
        """Whether a score on held-out data is worth keeping: no checkpoint has a better one."""
        if not self.config.keep_best or score is None:
            return False
        best = self.task.best[1]
        return on_main(
            lambda: best([score, *checkpoint.scores(run / "checkpoints").values()]) == score
        )

    def resume(self, run: Path, log: Callable[[str], None]) -> int:
        """Load the newest complete checkpoint of `run`; returns the step to go on with."""
        for what in on_main(lambda: checkpoint.clean(run)):
            log(f"removed {what}")
        found = checkpoint.newest(run / "checkpoints")
        if len(seen := set(gather_objects(found and found[1]["step"]))) > 1:
            stop_all(f"{run} holds other steps for each process ({seen}): put it on a shared disk")
        if found is None or found[1]["step"] < self.config.steps:
            on_main(lambda: check_space(run, self.size, "a checkpoint takes"))
        if found is None:
            return 0
        state, manifest, skipped = found
        for why in skipped:
            log(f"checkpoint skipped: {why}")
        before = manifest.get("source", {})
        if other := [name for name in before if before[name] != self.source.get(name)]:
            stop_all(
                f"{run} was begun with other {' and '.join(other)} than are there now: put back "
                f"what it learnt from, give run=ANOTHER, or --restart to begin anew"
            )
        for name, part in self.task.parts.items():
            part.load_state_dict(state[name])
        for name, optimizer in self.optimizers.items():
            checkpoint.unflatten(optimizer, state.get(f"optim-{name}", {}))
        self.ema.module.load_state_dict(state["average"])
        log(f"resuming {run} at step {manifest['step']}")
        if (others := manifest.get("processes", 1)) != world():
            log(f"{others} processes before, {world()} now: the same samples in the same order")
        self.start = manifest["step"]
        return self.start
