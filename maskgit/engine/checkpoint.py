"""Checkpoints that are complete or not there: written aside, synced, hashed, then renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from maskgit.common import UserError
from maskgit.common.folder import PARTIAL, file_hash, naming, unfinished, write_tensors

MANIFEST = "manifest.json"  # written last: a folder without it is not a checkpoint
REMOVED = ".removed-"  # begins the name of a folder that is being deleted
State = dict[str, dict[str, Tensor]]  # file name -> tensors


def save(
    folder: Path,
    step: int,
    state: State,
    meta: dict[str, Any],
    keep: int = 2,
    best: Callable[..., float] | None = None,
) -> Path:
    """Write `folder/step_N` holding one safetensors file per entry of `state`.

    The older ones beyond the newest `keep` go only after the new one stands under its name; with
    `best` (min or max), so do all but the one of the best `score` that their `meta` tells.
    """
    target = folder / name_of(step)
    partial = folder / f"{PARTIAL}{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, state, {"step": step, **meta})
    except OSError:  # on a full disk, half a checkpoint is in the way
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():  # damaged, or a run went back to before it
        _remove(target)
    partial.rename(target)
    _sync(folder)
    # Damaged newer ones, which a resumed run passed over, do not count as kept.
    standing = [p for p in steps(folder) if p.name <= target.name]
    kept = {*standing[-keep:], best_of(folder, best) if best else None}
    for old in standing:
        if old not in kept:
            _remove(old)
    return target


def _write(folder: Path, state: State, meta: dict[str, Any]) -> None:
    """All files of a checkpoint, the manifest last, so that they outlive a loss of power."""
    folder.mkdir(parents=True)
    for name, tensors in state.items():
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_tensors(folder / f"{name}.safetensors", plain)
    manifest = {**meta, "files": {p.name: file_hash(p) for p in sorted(folder.iterdir())}}
    manifest["sha256"] = _digest(manifest)
    with naming(folder / MANIFEST):
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*folder.iterdir(), folder]:
        with naming(path):
            _sync(path)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; UserError if that is damaged."""
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest.pop("sha256", None) != _digest(manifest):
        raise UserError(f"{MANIFEST} does not have the hash that it says")
    return manifest


def _remove(path: Path) -> None:
    """Rename, then delete: a kill in between leaves nothing that looks like a checkpoint."""
    removed = path.with_name(f"{REMOVED}{path.name}")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def clean(run: Path) -> list[str]:
    """Delete what a killed process was writing or deleting in a run's folder; says what it was."""
    places = (run, run / "checkpoints")
    folders = [p for place in places for x in (PARTIAL, REMOVED) for p in place.glob(f"{x}*")]
    exports = [folder for name in ("export", "best") for folder in (run / name).glob("**/")]
    files = [path for folder in (run, run / "samples", *exports) for path in unfinished(folder)]
    for path in folders:
        shutil.rmtree(path)
    for path in files:
        path.unlink()
    return [
        f"{path}: " + ("half deleted" if path.name.startswith(REMOVED) else "never completed")
        for path in folders + files
    ]


def scores(folder: Path) -> dict[Path, float]:
    """Of each complete checkpoint that has one, its score on held-out data."""
    found = {}
    for path in steps(folder):
        try:
            score = read_manifest(path)["score"]
        except (OSError, ValueError, KeyError, UserError):
            continue
        if score is not None:
            found[path] = score
    return found


def best_of(folder: Path, best: Callable[..., float]) -> Path | None:
    """The checkpoint of the best score; `best` is min or max."""
    found = scores(folder)
    return best(found, key=found.__getitem__) if found else None  # type: ignore[return-value]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def steps(folder: Path) -> list[Path]:
    """Checkpoint folders under their final names, oldest first."""
    found = (p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name))
    return sorted(p for p in found if p.is_dir())


def newest(folder: Path) -> tuple[State, dict[str, Any], list[str]] | None:
    """State and manifest of the newest complete checkpoint, and which newer ones were skipped."""
    skipped: list[str] = []
    for path in reversed(steps(folder)):
        try:
            manifest = read_manifest(path)
            for name, known in manifest["files"].items():
                if file_hash(path / name) != known:
                    raise UserError(f"{name} does not have the hash in {MANIFEST}")
            state = {Path(name).stem: load_file(path / name) for name in manifest["files"]}
        except (OSError, ValueError, KeyError, UserError) as error:
            skipped.append(f"{path.name}: {error}")
            continue
        return state, manifest, skipped
    if steps(folder):
        raise UserError(
            f"no complete checkpoint in {folder} ({'; '.join(skipped)}): --restart begins anew"
        )
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
