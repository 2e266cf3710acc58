"""`maskgit train --dry-run`: builds a run, tries two of its steps, and tells what it takes."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from maskgit.common import UserError
from maskgit.common.device import pick_device
from maskgit.common.folder import free_space
from maskgit.common.processes import on_main, world
from maskgit.common.progress import clock
from maskgit.engine import checkpoint
from maskgit.engine.data import SPLITS, ImageSet, open_images
from maskgit.engine.loop import make_accelerator
from maskgit.engine.speed import flops_of
from maskgit.engine.state import State
from maskgit.engine.task import Batch, TrainConfig
from maskgit.engine.tokenize import make_tokens
from maskgit.engine.tokens import INDEX, is_cache
from maskgit.joins import JOINS, check_size, said_once
from maskgit.run_folder import check_config, check_writable
from maskgit.runs import MaskGITRun
from maskgit.tokenized import token_stamp
from vqgan import VQGAN

Say = Callable[[str], None]
FEW = 16  # images that become tokens here, where a run would first encode all


@dataclass
class Found:
    """What the steps have shown."""

    flops: int  # of a step, of all processes
    memory: int  # bytes, of this process at its peak
    seconds: float  # of a step


class Disk(NamedTuple):
    """Bytes that a run needs."""

    checkpoint: int
    export: int
    tokens: int  # that it would make

    def all(self, train: TrainConfig) -> int:
        """With one checkpoint being written before an old one goes."""
        checkpoints = (train.keep_last + train.keep_best + 1) * self.checkpoint
        return checkpoints + (1 + train.keep_best) * self.export + self.tokens


def dry_run(run: Any, say: Say = print) -> None:
    """Build what `run` describes as a run would, try its first steps, and say what it takes.

    Reads weights and data, a batch of each set among them. Of the run's steps, some of the last are
    tried, when all losses take part. Writes nothing into the run's folder. Raises UserError for
    what would stop the run at its start, and where a step needs more memory than the GPU has.
    """
    folder = Path(run.run)
    accelerator = make_accelerator(run.train)
    say = said_once(say)

    def check() -> None:
        check_writable(folder)
        check_config(folder, run)

    on_main(check)
    torch.manual_seed(run.train.seed)
    with TemporaryDirectory(prefix="maskgit-dry-run-") as temporary:
        own = Path(temporary)
        tokens = few_tokens(run, own / "tokens", say) if run.task == "maskgit" else 0
        task, stream, validation, _ = JOINS[run.task](run, own, say)
        for name, batches in validation.items():
            if next(iter(batches()), None) is None:
                raise UserError(f"the {name} images of {run.data.path} cannot be used")
        state = State(task, run.train, accelerator, say)
        found = try_steps(run, state, stream)
        task.export(state.ema.module, own / "export")
        export = sum(file.stat().st_size for file in (own / "export").rglob("*") if file.is_file())
    disk = Disk(state.size, export, tokens)
    for line in table(rows(run, state, found, disk, folder)):
        say(line)
    if (free := free_space(folder)) < disk.all(run.train):
        needed = size(disk.all(run.train))
        say(f"warning: {needed} are needed in {folder}, and {size(free)} are free")


def few_tokens(run: MaskGITRun, folder: Path, say: Say) -> int:
    """Where a run would first encode all its images, encode a few of each set, and let `run` take
    these. Returns how many bytes the tokens of all will take in the run's folder."""
    if is_cache(Path(run.data.path).expanduser()):
        return 0
    device = pick_device(run.train.device)
    tokenizer = VQGAN.from_pretrained(run.tokenizer).to(device)
    check_size(run.data.size, tokenizer.config.factor)
    needed = count = 0
    for split in SPLITS:
        images = open_images(run.data, split)
        if not (Path(run.run) / "tokens" / split / INDEX).is_file():
            needed += token_stamp(run.tokenizer, tokenizer, images).nbytes
            count += len(images)
        some = ImageSet(images.items[:FEW], images.classes, images.config, images.files)
        stamp = token_stamp(run.tokenizer, tokenizer, some)
        make_tokens(folder / split, stamp, some, tokenizer.encode, device)
    if needed:
        say(
            f"the run would begin by encoding {count:,} images, to {size(needed)} of tokens; "
            f"maskgit tokenize does that apart, on any number of processes"
        )
    run.data.path = str(folder)
    return needed


def late_steps(run: Any) -> range:
    """Some of the last steps of a run, when all that it has takes part.

    Two, of which the second is to be measured; three where a penalty is taken at some steps alone,
    the first being one of these.
    """
    loss = run.loss
    first = max(run.train.steps - 2, getattr(loss, "quantize_from", -1) + 1)
    lazy = getattr(loss, "r1", 0) and loss.r1_every > 1
    if lazy:
        first += -(first - loss.discriminator_from) % loss.r1_every
    return range(first, first + 2 + bool(lazy))


def try_steps(run: Any, state: State, stream: Callable[[int], Iterator[Batch]]) -> Found:
    """Update on real batches; UserError where they do not fit into the memory of a GPU."""
    steps = late_steps(run)
    *before, last = steps
    cuda = state.accelerator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    batches = stream(steps.start)
    try:
        for step in before:
            update = partial(state.update, next(batches), step)
            notes, flops = flops_of(update, run.train.compile)
            state.heed(notes)
        if run.train.compile:
            state.heed(state.update(next(batches), last))
        begun = time.monotonic()
        state.heed(state.update(next(batches), last))
        seconds = time.monotonic() - begun
    except torch.OutOfMemoryError:
        train, share = run.train, run.train.batch_size // world()
        fewer = max(1, min(share, train.micro_batch or share) // 2)
        raise UserError(
            f"a step of train.batch_size={train.batch_size} images does not fit into the GPU's "
            f"memory: take train.micro_batch={fewer} of them at a time, more processes, or "
            f"train.activation_checkpointing=true"
        ) from None
    memory = torch.cuda.max_memory_allocated() if cuda else resident()
    return Found(flops * world(), memory, seconds)


def resident() -> int:
    """Bytes that this process had in memory at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rows(
    run: Any, state: State, found: Found, disk: Disk, folder: Path
) -> Iterator[tuple[str, str]]:
    """What there is to tell, by name."""
    for name, part in state.task.parts.items():
        count = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        if count:
            still = "" if trained == count else f", {short(trained)} of them trained"
            yield f"parameters of {name}", f"{short(count)}{still}"
    train, each = run.train, "" if world() == 1 else f", each of {world()} processes"
    yield "FLOPs a step", f"{short(found.flops)}, forward and backward, {train.batch_size} images"
    yield "peak memory", f"{size(found.memory)} {_where(state)}{each}"
    rate = train.batch_size / found.seconds
    yield "images/s", f"{rate:.3g}"
    left = train.steps - done(folder)
    yield "time to the end", f"{span(left * found.seconds)} for {left:,} steps, without validation"
    kept = f"{train.keep_last + train.keep_best} checkpoints of {size(disk.checkpoint)}"
    rest = "the export, the tokens" if disk.tokens else "the export"
    yield "disk needed", f"{size(disk.all(train))}: {kept}, one being written, {rest}"
    yield "disk free", f"{size(free_space(folder))} in {folder}"


def _where(state: State) -> str:
    device = state.accelerator.device
    if device.type != "cuda":
        return "resident"
    return f"of {size(torch.cuda.get_device_properties(device).total_memory)} on the GPU"


def done(folder: Path) -> int:
    """The step of the newest checkpoint of a run, 0 for one that has none."""
    found = checkpoint.steps(folder / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def table(rows: Iterator[tuple[str, str]]) -> list[str]:
    """Lines of two columns."""
    pairs = list(rows)
    width = max(len(name) for name, _ in pairs)
    return [f"{name:{width}}  {value}" for name, value in pairs]


def short(count: float) -> str:
    """A count in three or four digits: "54.5 M", "1.23 T"."""
    for unit in ("", " k", " M", " G", " T"):
        if count < 1000:
            return f"{count:.4g}{unit}" if unit else f"{count:g}"
        count /= 1000
    return f"{count:.4g} P"


def size(count: int) -> str:
    """A number of bytes."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def span(seconds: float) -> str:
    """A time, in days where there are several."""
    return f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else clock(seconds)
