"""Tensors that are kept between runs, in files that vouch for their content."""

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from maskgit.common import UserError
from maskgit.common.folder import load_state, write_tensors

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """`maskgit/features` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maskgit/features"


def load(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file of the cache; None if it is not there, or not as it was written."""
    if not path.is_file():
        return None
    try:
        tensors = load_state(path)
    except UserError:
        tensors = {}
    digest = tensors.pop("sha256", None)
    if digest is None or not digest.equal(_digest(tensors)):
        log.warning("%s is damaged: computing its content anew", path)
        return None
    return tensors


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file as a whole or not at all; that it cannot be written is a warning."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(partial, {**tensors, "sha256": _digest(tensors)})
        partial.replace(path)
    except OSError as error:  # the next run computes them again, nothing else is lost
        log.warning("nothing is kept in %s: %s", path.parent, error.strerror or error)
        with suppress(OSError):
            partial.unlink()


def _digest(tensors: dict[str, Tensor]) -> Tensor:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
