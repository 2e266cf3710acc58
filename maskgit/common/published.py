"""The tensors of a file that somebody published, of any format; nothing in it is executed."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.common.errors import UserError
from maskgit.common.flax import read_flax
from maskgit.common.folder import load_state
from maskgit.common.pickles import Record, flatten, read_torch
from maskgit.common.unpickle import printable

if TYPE_CHECKING:
    import torch

# Where a training checkpoint has its weights: the first of these, and of these in that.
WEIGHTS = ("ema", "model", "state_dict", "model_state_dict")
WRAPPERS = ("module.", "_orig_mod.")  # begin the names of parallel and of compiled models
MAPS = (*range(0x81, 0x90), 0xDE, 0xDF)  # the first byte of a msgpack that is a map, not empty


def read_tensors(path: str | Path) -> "dict[str, torch.Tensor]":
    """The tensors of a safetensors file, of one of torch's or TorchScript's, or of flax's.

    The content says which it is, not the name. Of a training checkpoint come the weights, the
    averaged ones if it has them; names are without the prefixes of wrappers. Raises UserError for
    a file of another format, a damaged one, one without tensors, and one that would run code.
    """
    path = Path(path)
    tensors = FORMATS[file_format(path)](path)
    if not all(name.isprintable() for name in tensors):
        raise UserError(f"{path} has tensors whose names are no text: fetch it again")
    if not tensors:
        raise UserError(f"{path} holds no tensors: pass the file with the weights")
    return tensors


def file_format(path: Path) -> str:
    """ "safetensors", "torch" or "flax", from the first bytes of a file."""
    try:
        with path.open("rb") as file:
            start, size = file.read(512), path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < size:
        return "safetensors"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80" or start[257:262] == b"ustar":
        return "torch"
    if start and start[0] in MAPS:
        return "flax"
    raise UserError(
        f"{path} is empty or of no format known: it takes files of safetensors, of torch.save, and "
        "of flax (msgpack)"
    )


def _torch(path: Path) -> "dict[str, torch.Tensor]":
    content = read_torch(path)
    while isinstance(content, dict) and not isinstance(content, Record):
        inner = next((content[key] for key in WEIGHTS if _weights(content.get(key))), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        kind = printable(type(content).__name__)
        raise UserError(f"{path} holds a {kind}, not the tensors of a model")
    return unwrapped(flatten(content), path)


def _weights(content: Any) -> bool:
    """Whether there are tensors in a dict, or in dicts in it."""
    return isinstance(content, dict) and bool(flatten(content))


def unwrapped(tensors: "Mapping[str, torch.Tensor]", path: Path) -> "dict[str, torch.Tensor]":
    """The tensors by their names in the model itself."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        if name in found:
            raise UserError(f"{path} has two tensors {printable(name)}, one of them wrapped")
        found[name] = tensor
    return found


FORMATS = {
    "safetensors": lambda path: unwrapped(load_state(path), path),
    "torch": _torch,
    "flax": read_flax,
}
