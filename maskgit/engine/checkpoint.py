"""Checkpoints that are complete or not there: written aside, synced, hashed, then renamed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from maskgit.common import UserError
from maskgit.common.folder import file_hash, write_tensors

MANIFEST = "manifest.json"  # written last: a folder without it is not a checkpoint
State = dict[str, dict[str, Tensor]]  # file name -> tensors


def save(folder: Path, step: int, state: State, meta: dict[str, Any], keep: int = 2) -> Path:
    """Write `folder/step_N` holding one safetensors file per entry of `state`.

    The older ones beyond the newest `keep` go only after the new one stands under its name.
    """
    target = folder / f"step_{step:08d}"
    partial = folder / f".partial-{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in state.items():
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_tensors(partial / f"{name}.safetensors", plain)
    hashes = {p.name: file_hash(p) for p in sorted(partial.iterdir())}
    manifest = {"step": step, "files": hashes, **meta}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _sync(folder)
    # Damaged newer ones, which a resumed run passed over, do not count as kept.
    for old in [p for p in steps(folder) if p.name <= target.name][:-keep]:
        shutil.rmtree(old)
    return target


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps(folder: Path) -> list[Path]:
    """Checkpoint folders under their final names, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def newest(folder: Path) -> tuple[State, dict[str, Any], list[str]] | None:
    """State and manifest of the newest complete checkpoint, and which newer ones were skipped."""
    skipped = [f"{p.name}: never completed" for p in folder.glob(".partial-*")]
    for path in reversed(steps(folder)):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            for name, known in manifest["files"].items():
                if file_hash(path / name) != known:
                    raise UserError(f"{name} does not have the hash in {MANIFEST}")
            state = {Path(name).stem: load_file(path / name) for name in manifest["files"]}
        except (OSError, ValueError, KeyError, UserError) as error:
            skipped.append(f"{path.name}: {error}")
            continue
        return state, manifest, skipped
    if steps(folder):
        raise UserError(f"no complete checkpoint in {folder} ({'; '.join(skipped)}): start anew")
    return None


def flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors ("3.exp_avg"); its settings come from the config."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, s in state.items() for key, value in s.items()}


def unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put what `flatten` gave back into an optimizer of the same parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        i, key = name.split(".", 1)
        if value.ndim:  # in the parameter's memory format: the fused update takes it for granted
            value = torch.empty_like(parameters[int(i)]).copy_(value)
        state.setdefault(int(i), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
