"""What the training loop costs beside what it is for: forward, backward and optimizer.

Limits: 3 % of the time with cached tokens, 10 % with images from shards. What passes over all the
weights anyway, clipping and the moving average, stands apart; the rest is the loop's own: waiting
for data, moving it, freeing gradients, notes and logging.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from maskgit.commands.train import CONFIGS
from maskgit.engine import state
from maskgit.engine.config import parse_overrides, read_yaml
from maskgit.engine.ema import EMA
from maskgit.engine.micro import Losses
from maskgit.engine.state import State
from maskgit.evaluation.report import table
from maskgit.joins import start
from maskgit.runs import resolve

WARM = 10  # steps that are not counted
STAGES: dict[str, tuple[Any, str]] = {
    "forward": (Losses, "forward"),
    "backward": (torch.Tensor, "backward"),
    "clipping": (state, "clipped"),
    "optimizer": (torch.optim.AdamW, "step"),
    "average": (EMA, "update"),
}


def run() -> list[dict[str, Any]]:
    """One row a kind of data: milliseconds a step, and the shares of its stages and of the rest."""
    rows = [
        overhead("cached tokens", "emoji_maskgit", 200, 0.03),
        # Within one epoch: no image of these has been decoded before.
        overhead("images from shards", "emoji_vqgan", 90, 0.10, "loss.quantize_from=0"),
    ]
    columns = ("what", "ms", *STAGES, "rest", "limit")
    shown = [
        (row["what"], f"{row['ms']:.1f}", *(f"{row[column]:.1%}" for column in columns[2:]))
        for row in rows
    ]
    table(columns, shown)
    return rows


def overhead(what: str, config: str, steps: int, limit: float, *more: str) -> dict[str, Any]:
    """Train `config` for some steps, and see what time went where."""
    settings = [
        f"train.steps={steps + WARM}",
        "train.compile=false",
        "train.log_every=10",
        *(f"train.{name}_every=0" for name in ("validate", "draw", "save")),
        *more,
        "train.save_minutes=0",
    ]
    spent = dict.fromkeys(STAGES, 0.0)
    marks: list[dict[str, float]] = []  # at each step's beginning: the time, and what was spent
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        words = parse_overrides([*settings, f"run={folder}/run"])
        described, _ = resolve(read_yaml(config, CONFIGS), words, smoke=False)
        for stage, (owner, name) in STAGES.items():
            stack.enter_context(_timed(owner, name, spent, stage))
        stack.enter_context(_marked(marks, spent))
        start(described, say=lambda line: None)
    first, last = marks[WARM], marks[-1]
    seconds = last["time"] - first["time"]
    stages = {stage: (last[stage] - first[stage]) / seconds for stage in STAGES}
    return {
        "what": what,
        "config": config,
        "steps": steps - 1,
        "ms": 1000 * seconds / (steps - 1),
        **stages,
        "rest": 1 - sum(stages.values()),
        "limit": limit,
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
            _wait()
            spent[stage] += time.perf_counter() - since

    with patch.object(owner, name, measured):
        yield


@contextmanager
def _marked(marks: list[dict[str, float]], spent: dict[str, float]) -> Iterator[None]:
    """Note when each step begins, and what was spent before."""
    update = State.update

    def marked(*args: Any, **options: Any) -> Any:
        _wait()
        marks.append({"time": time.perf_counter(), **spent})
        return update(*args, **options)

    with patch.object(State, "update", marked):
        yield


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
