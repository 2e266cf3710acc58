"""The tensors of a file that somebody published, of any format; nothing in it is executed. And a
model of ours made of them, strictly."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from maskgit.common.errors import UserError
from maskgit.common.flax import read_flax
from maskgit.common.folder import load_state
from maskgit.common.pickles import Record, flatten, read_torch
from maskgit.common.unpickle import printable

if TYPE_CHECKING:
    import torch
    from torch import nn

M = TypeVar("M", bound="nn.Module")
# Where a training checkpoint has its weights: the first of these, and of these in that.
WEIGHTS = ("ema", "model", "state_dict", "model_state_dict")
WRAPPERS = ("module.", "_orig_mod.")  # begin the names of parallel and of compiled models
MAPS = (*range(0x81, 0x90), 0xDE, 0xDF)  # the first byte of a msgpack that is a map, not empty
LISTED = 8  # names of a kind in an error


def read_tensors(path: str | Path) -> "dict[str, torch.Tensor]":
    """The tensors of a safetensors file, of one of torch's or TorchScript's, or of flax's.

    The content says which it is, not the name. Of a training checkpoint come the weights, the
    averaged ones if it has them; names are without the prefixes of wrappers. All of them have
    numbers, and together at most twice the bytes of the file: one can stand there under two names.
    Raises UserError for a file of another format, a damaged one, one without tensors, and one that
    would run code.
    """
    path = Path(path)
    tensors = FORMATS[file_format(path)](path)
    if not tensors:
        raise UserError(f"{path} holds no tensors: pass the file with the weights")
    empty = [name for name, tensor in tensors.items() if 0 in tensor.shape]
    if empty:
        raise UserError(f"{path} has tensors without numbers ({listed(empty)}): fetch it again")
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:
        raise UserError(f"{path} has the same numbers under many names: it holds no model")
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
        inner = next((content[key] for key in WEIGHTS if _weights(content.get(key), path)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        kind = printable(type(content).__name__)
        raise UserError(f"{path} holds a {kind}, not the tensors of a model")
    return unwrapped(flatten(content, path), path)


def _weights(content: Any, path: Path) -> bool:
    """Whether there are tensors in a dict, or in dicts in it."""
    return isinstance(content, dict) and bool(flatten(content, path))


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
    "safetensors": lambda path: unwrapped(flatten(load_state(path), path), path),
    "torch": _torch,
    "flax": read_flax,
}


def skeleton(what: str, make: Callable[[], M]) -> M:
    """A model without numbers, which takes no memory and no time; UserError, which begins with
    `what` it is, where it has more of them than can be counted."""
    import torch

    try:
        with torch.device("meta"):
            return make()
    except RuntimeError:
        raise UserError(f"{what}: of these shapes it would be too large: fetch it again") from None


def check(
    what: str,
    expected: "Mapping[str, torch.Tensor | None]",
    found: "Mapping[str, torch.Tensor]",
    spelt: Mapping[str, str] | None = None,
) -> None:
    """UserError that lists what the tensors of a file lack, or have beside what is expected.

    what: what the file is. expected: tensors of these shapes, None where any will do. spelt: what
    a name is called in the file, where that differs.
    """
    pairs = [(name, found[name], expected[name]) for name in expected if name in found]
    wrong = {
        "missing": [name for name in expected if name not in found],
        "of another shape": [
            x for x, one, own in pairs if own is not None and one.shape != own.shape
        ],
        "not of floating point": [x for x, one, _ in pairs if not one.is_floating_point()],
        "left over": [name for name in found if name not in expected],
    }
    told = [
        f"{len(names)} {kind} ({listed([(spelt or {}).get(name, name) for name in names])})"
        for kind, names in wrong.items()
        if names
    ]
    if told:
        raise UserError(
            f"{what}, but of its tensors {', '.join(told)}: fetch the file again, and pass it as "
            "it was published"
        )


def listed(names: list[str]) -> str:
    """The first of some names."""
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return ", ".join(names[:LISTED] + more)


def fill(
    what: str,
    model: M,
    names: Mapping[str, str],
    found: "Mapping[str, torch.Tensor]",
    spelt: Mapping[str, str] | None = None,
) -> M:
    """Copy tensors into a `skeleton`, which is then in fp32 and eval mode.

    names: those in `found` by the model's own. Raises UserError as `check` does, before any memory
    is taken.
    """
    own = model.state_dict()
    check(what, {theirs: own[ours] for ours, theirs in names.items()}, found, spelt)
    model.to_empty(device=next(iter(found.values())).device)
    model.load_state_dict({ours: found[theirs] for ours, theirs in names.items()})
    return model.eval()
