"""A training step of each task against what the machine can do, and what the loop costs beside it.

A step is that of the bundled recipe, late, when all its losses take part, on a batch that is there
already. Its limit is the rate of the products that occur in it, or that of its forward pass's
convolutions; `matrix` is what every run holds its own rate against.

In the loop, forward, backward and optimizer are `learning`: 90 % of the time or more. What passes
over all the weights anyway, clipping and the moving average, stands apart; the rest is the loop's
own: waiting for data, moving it, freeing gradients, notes and logging. It is to be 3 % at most with
cached tokens, 10 % with images from shards.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import all_convolutions, measure, products_apart, wait
from benchmarks.table import LIMITS, Columns, Row, number
from maskgit.commands.train import CONFIGS
from maskgit.dry_run import few_tokens, late_steps
from maskgit.engine import state
from maskgit.engine.config import parse_overrides, read_yaml
from maskgit.engine.ema import EMA
from maskgit.engine.loop import make_accelerator, precision
from maskgit.engine.micro import Losses
from maskgit.engine.speed import matrix_rate
from maskgit.engine.state import State
from maskgit.joins import JOINS, start
from maskgit.runs import resolve

WARM = 10  # steps that are not counted
BLOCKS = 5  # of the steps that are: the repeats of a row
STAGES: dict[str, tuple[Any, str]] = {
    "forward": (Losses, "forward"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "clipping": (state, "clipped"),
    "average": (EMA, "update"),
}
LEARNING = list(STAGES)[:3]
STEPS: dict[str, tuple[str, Any, list[str]]] = {
    "transformer": ("emoji_maskgit", products_apart, []),
    "tokenizer": ("emoji_vqgan", all_convolutions, []),
    "decoder, adversarial": ("emoji_decoder", all_convolutions, ["init=emoji"]),
    "clip": ("emoji_clip", all_convolutions, []),
    "classifier": ("emoji_classifier", all_convolutions, []),
}
COLUMNS: Columns = {
    **{name: column for name, column in LIMITS.items() if name != "times"},
    "matrix": number("matrix", 1e9, ".0f"),
    "images/s": number("images", form=".0f"),
    "tokens/s": number("tokens", form=".0f"),
    "learning": number("learning", form=".1%"),
    "rest": number("rest", form=".1%"),
}


def run(full: bool = False) -> Iterator[Row]:
    """A row a task, and one for the loop with each kind of data. full: more steps of the loop."""
    for what, (config, limit, settings) in STEPS.items():
        yield one_step(f"a step: {what}", config, limit, *settings)
    yield overhead("the loop: cached tokens", "emoji_maskgit", 200 if full else 100, 0.03)
    # Within one epoch: no image of these has been decoded before.
    of_images = "the loop: images from shards", "emoji_vqgan", 90 if full else 40, 0.10
    yield overhead(*of_images, "loss.quantize_from=0")


def described(config: str, folder: str, *settings: str) -> Any:
    """The run that `config` and settings describe, uncompiled, in a folder."""
    words = parse_overrides(["train.compile=false", *settings, f"run={folder}/run"])
    return resolve(read_yaml(config, CONFIGS), words, smoke=False)[0]


def one_step(what: str, config: str, limit: Any, *settings: str, repeats: int = 4) -> Row:
    """One update of the parts of `config`, late in the run, against the machine."""

    def quiet(line: str) -> None: ...

    with tempfile.TemporaryDirectory() as folder:
        run = described(config, folder, *settings)
        accelerator = make_accelerator(run.train)
        torch.manual_seed(run.train.seed)
        if run.task == "maskgit":
            few_tokens(run, Path(folder, "tokens"), quiet)
        task, stream, *_ = JOINS[run.task](run, Path(folder), quiet)
        trained = State(task, run.train, accelerator, quiet)
        step = late_steps(run).start
        batch = next(stream(step))
        trained.heed(trained.update(batch, step))  # the optimizer makes its moments
        row = measure(what, lambda: trained.heed(trained.update(batch, step)), repeats, limit)
    rate = run.train.batch_size / row["median"]
    row |= {unit: n * rate for unit, n in task.units.items()}
    return row | {"matrix": matrix_rate(accelerator.device, precision(accelerator))}


def overhead(what: str, config: str, steps: int, limit: float, *settings: str) -> Row:
    """Train `config` for some steps, and see what time went where."""
    quick = [f"train.{name}_every=0" for name in ("validate", "draw", "save")]
    quick += [f"train.steps={steps + WARM}", "train.log_every=10", "train.save_minutes=0"]
    spent = dict.fromkeys(STAGES, 0.0)
    marks: list[dict[str, float]] = []  # at each step's beginning: the time, and what was spent
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for stage, (owner, name) in STAGES.items():
            stack.enter_context(_timed(owner, name, spent, stage))
        stack.enter_context(_marked(marks, spent))
        start(described(config, folder, *quick, *settings), say=lambda line: None)
    first, last = marks[WARM], marks[-1]
    whole = last["time"] - first["time"]
    stages = {stage: (last[stage] - first[stage]) / whole for stage in STAGES}
    ends = [WARM + (len(marks) - 1 - WARM) * i // BLOCKS for i in range(BLOCKS + 1)]
    seconds = [(marks[b]["time"] - marks[a]["time"]) / (b - a) for a, b in pairwise(ends)]
    return {
        "what": what,
        "config": config,
        "steps": steps - 1,
        "seconds": seconds,  # a step, of some steps each
        "median": statistics.median(seconds),
        **stages,
        "learning": sum(stages[stage] for stage in LEARNING),
        "rest": 1 - sum(stages.values()),
        "most": limit,  # that the rest is to be
    }


@contextmanager
def _timed(owner: Any, name: str, spent: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that a method takes to spent[stage]."""
    method: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **options: Any) -> Any:
        since = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            wait()
            spent[stage] += time.perf_counter() - since

    with patch.object(owner, name, measured):
        yield


@contextmanager
def _marked(marks: list[dict[str, float]], spent: dict[str, float]) -> Iterator[None]:
    """Note when each step begins, and what was spent before."""
    update = State.update

    def marked(*args: Any, **options: Any) -> Any:
        wait()
        marks.append({"time": time.perf_counter(), **spent})
        return update(*args, **options)

    with patch.object(State, "update", marked):
        yield
