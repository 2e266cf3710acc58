"""The training loop. It knows devices, processes, averages and checkpoints, and no task."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from maskgit.common import UserError
from maskgit.common.device import pick_device, pick_dtype
from maskgit.common.processes import gather_objects, on_main, rank, world
from maskgit.common.progress import Advance, meter
from maskgit.common.signals import Held, Interrupted, deadly, held
from maskgit.engine import checkpoint
from maskgit.engine.data import share_of
from maskgit.engine.journal import Journal
from maskgit.engine.speed import Pace, is_counted, machine_rate
from maskgit.engine.state import FLOPS, Notes, State
from maskgit.engine.task import Batch, Task, TrainConfig

Sets = dict[str, Callable[[], Iterable[Batch]]]
# For so long processes wait for the main one to validate, draw and save.
PATIENCE = timedelta(hours=4)


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived; everything is saved."""

    def __init__(self, number: int, step: int) -> None:
        saved = f"saved at step {step}" if step else "nothing had been learnt yet"
        super().__init__(f"stopped by a signal; {saved}")
        self.status = 128 + number


def train(
    task: Task,
    batches: Callable[[int], Iterator[Batch]],
    validation: Sets,
    config: TrainConfig,
    run: Path,
    log: Callable[[str], None] = print,
    source: dict[str, str] | None = None,
) -> dict[str, float] | None:
    """Train up to `config.steps`, from the newest complete checkpoint of the folder `run` if any.

    `batches(step)` gives this process's share of the batches from that step on; `validation` names
    sets, each a function that gives the same batches at each call; `source` has hashes of what is
    learnt from, and a run that was begun with others is refused. Writes `metrics.jsonl`,
    `samples/`, `checkpoints/`, what trackers write and, at each save, `export/`. Returns the last
    metrics, or None if the run had finished before. Raises Stopped after a signal, once all is
    saved. All processes call it; the main one validates, draws, writes and tells.
    """
    accelerator = make_accelerator(config)
    state = State(task, config, accelerator, log, source)
    start = state.resume(run, log)
    if start >= config.steps:
        on_main(lambda: state.export(run / "export"))  # a kill may have come before it
        return None
    last: dict[str, float] = {}
    unheeded: list[Notes] = []
    pace = Pace(_machine_rate(accelerator, log) if config.log_every > 0 else 0.0)
    saved = time.monotonic()
    with held() as stop, _journal(run, start, config) as (journal, advance):
        stream = batches(start)
        for step in range(start, config.steps):
            done, late = step + 1, 0 < 60 * config.save_minutes < time.monotonic() - saved
            todo = due(config, done)
            with pace:
                batch = _next(stream, state, run, step, unheeded, stop)
                update = state.counted if is_counted(step, config.log_every) else state.update
                unheeded.append(update(batch, step, late, bool(stop)))
                saved = time.monotonic() if late else saved  # it is asked for once
                # On a GPU the host is a step ahead, and waits for nothing but the step before;
                # unless something is to be done with what this one has made.
                while len(unheeded) > (accelerator.device.type == "cuda" and not todo):
                    todo |= state.heed(unheeded.pop(0))
                logged = state.logged() if "log" in todo else {}
            score = None
            if logged:
                pace.flops = logged.pop(FLOPS, pace.flops)
                logged |= pace.rates(config.batch_size, task.units)
            if "validate" in todo:
                heldout = on_main(lambda: _validate(state, validation, stop))
                score = heldout.get(task.best[0])
                if heldout:
                    log(f"step {done}: " + _line(last | logged | heldout))
                logged |= heldout
            if logged:
                last |= logged
                if journal:
                    journal.write(done, logged)
                for warning in task.watch(done, logged):
                    log(f"warning: {warning}")
            better = state.is_best(run, score)
            if better:  # before its checkpoint, so that no kill comes between for good
                on_main(lambda: state.export(run / "best"))
            if better or todo & {"save", "stop"}:
                state.save(run, done, score)
                saved = time.monotonic()
            if "draw" in todo:
                on_main(partial(_draw, state, journal, done, batch, stop))
            advance(note=f"loss {last['loss']:.4f}" if "loss" in last else "")
            if ("stop" in todo or done == config.steps) and any(
                numbers := gather_objects(stop[0] if stop else 0)
            ):
                raise Stopped(max(numbers), done)
    return last


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device, processes and precision of the forward pass, as the config and the launcher ask;
    UserError if it cannot be."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    if dtype == torch.float16:
        raise UserError("train.dtype=fp16 would need loss scaling: take bf16 or fp32")
    if device.index is not None:
        torch.cuda.set_device(device)
    with nullcontext() if dist.is_initialized() else deadly():  # while processes find each other
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    share = share_of(config.batch_size, world())
    if config.micro_batch and share % min(share, config.micro_batch):
        raise UserError(
            f"train.micro_batch={config.micro_batch} does not divide the {share} images of a step "
            f"that each process has"
        )
    return accelerator


def precision(accelerator: Accelerator) -> torch.dtype:
    """What the forward pass computes in."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def _machine_rate(accelerator: Accelerator, log: Callable[[str], None]) -> float:
    """What the machine can do at most in the precision of the forward pass; told to `log`."""
    dtype = precision(accelerator)
    rate = machine_rate(accelerator.device, dtype)
    whose = "this machine's products" if world() == 1 else f"products of {world()} processes"
    log(f"{whose}: {rate / 1e9:,.0f} GFLOP/s in {'bf16' if dtype == torch.bfloat16 else 'fp32'}")
    return rate


INTERVALS = ("log", "validate", "save", "draw")


def due(config: TrainConfig, done: int) -> set[str]:
    """What is to be done after step number `done`, from 1 on; all that is ever done at the last."""
    final = done == config.steps
    every = {name: getattr(config, f"{name}_every") for name in INTERVALS}
    todo = {name for name, n in every.items() if n > 0 and (final or done % n == 0)}
    return todo | {"log", "save"} if final else todo


def _next(
    stream: Iterator[Batch], state: State, run: Path, step: int, unheeded: list[Notes], stop: Held
) -> Batch:
    """The next batch; where there is none to be had, or a signal comes first, what was learnt is
    saved. Several processes cannot do that without each other, so there the batch is waited for."""
    try:
        with stop.ending() if world() == 1 else nullcontext():
            return next(stream)
    except (UserError, Interrupted) as error:
        stands = run / "checkpoints" / checkpoint.name_of(step)
        if world() == 1 and step > state.start and not stands.exists():
            for notes in unheeded:
                state.heed(notes)
            state.save(run, step)
        if isinstance(error, Interrupted):
            raise Stopped(stop[0], step) from None
        raise


def _draw(state: State, journal: Journal | None, done: int, batch: Batch, stop: Held) -> None:
    """A sheet of what the averaged weights make; none after a signal, which ends it early."""
    try:
        with stop.ending():
            sheet = state.task.draw(state.ema.module, state.on_device(batch))
    except Interrupted:
        return
    if journal:
        journal.picture(done, sheet)


def _validate(state: State, sets: Sets, stop: Held) -> dict[str, float]:
    """Scores of the averaged weights; none after a signal, which ends it early."""
    found: dict[str, float] = {}
    try:
        with stop.ending():
            for name, make in sets.items():
                scores = state.task.validate(state.ema.module, map(state.on_device, make()))
                found |= {f"{name}/{k}": v for k, v in scores.items()}
    except Interrupted:
        return {}
    return found


@contextmanager
def _journal(
    run: Path, start: int, config: TrainConfig
) -> Iterator[tuple[Journal | None, Advance]]:
    """The journal, and how to tell of progress: both in the main process alone."""
    if rank():
        yield None, lambda count=1, note="": None
        return
    journal = Journal(run, start, config.trackers, asdict(config))
    with closing(journal), meter(config.steps, "step", done=start) as advance:
        yield journal, advance


def _line(values: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.4g}" for k, v in values.items() if not k.startswith("accuracy_"))
