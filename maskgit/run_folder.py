"""A run's folder: whether it can be written, and whether what it holds may be gone on with."""

import os
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from maskgit.common import UserError
from maskgit.common.folder import LOCK
from maskgit.common.signals import deadly
from maskgit.engine import checkpoint
from maskgit.engine.config import differences, merge
from maskgit.engine.loop import INTERVALS

# What a run that goes on may change: not what it computes, but where, how fast and what it tells.
# What lies at the paths is compared by content, see `Joined` in joins.py.
FREE = {"run", "size", "data.path", "data.workers", "data.max_broken", "tokenizer", "captions"}
FREE |= {"sampling"} | {
    f"train.{name}"
    for name in (
        *("steps", "device", "compile", "micro_batch", "activation_checkpointing"),
        *("keep_last", "keep_best", "save_minutes", "trackers"),
        *(f"{interval}_every" for interval in INTERVALS),
    )
}


def check_writable(folder: Path) -> None:
    """UserError for a run's folder that cannot be written."""
    above = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to run={folder}: {above} is no folder that lets one")


def holds_something(folder: Path) -> bool:
    return any(path.name != LOCK for path in folder.iterdir())


def set_aside(folder: Path) -> Path:
    """Move all that a run's folder holds into a new one beside it; returns that."""
    numbers = (folder.with_name(f"{folder.name}.{n}") for n in count(1))
    aside = next(path for path in numbers if not path.exists())
    aside.mkdir()
    for path in folder.iterdir():
        if path.name != LOCK:
            path.rename(aside / path.name)
    return aside


def begun(folder: Path) -> bool:
    """Whether a run in this folder goes on from a checkpoint."""
    return bool(checkpoint.steps(folder / "checkpoints"))


def check_config(folder: Path, run: Any) -> None:
    """Refuse to go on with a run that other settings began."""
    if not begun(folder):
        return
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        raise UserError(
            f"{folder} has checkpoints but no config.yaml: give run=ANOTHER, or --restart"
        ) from None
    # A setting that there was none of yet had its default.
    with deadly():  # in the middle of OmegaConf, Ctrl-C becomes an error of another kind
        before = OmegaConf.to_container(merge(type(run), content or {}))
        now = OmegaConf.to_container(OmegaConf.structured(run))
    changed = [
        line
        for line in differences(before, now)
        if not FREE & {(key := line.split(":")[0]), key.split(".")[0]}
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run with another config ({'; '.join(changed)}): give run=ANOTHER "
            f"(and init={folder}/export to go on from its weights), or --restart to begin anew"
        )
