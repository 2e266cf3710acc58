"""Models on disk: a folder with `config.json` and `model.safetensors`, found by path or by name."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from maskgit.common.errors import UserError, nearest
from maskgit.common.hub import download, hub_id

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT_VERSION = 1
PARTIAL = ".partial-"  # begins the name of a folder that is being written
LOCK = ".lock"  # in a folder that one process at a time may write to
KINDS = ("vqgan", "transformer", "clip")  # the parts of a model, each a folder in its own
ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = {"emoji": ASSETS / "emoji"}  # models that travel with the project, by name

C = TypeVar("C")


def find(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a local folder, a bundled name ("emoji"), or a hub id ("user/name").

    A local folder comes first. "user/name@v1" is the hub's at the revision v1: a branch, a tag or a
    commit; so is `revision`, which goes before. The hub is asked first and, where it cannot be
    reached or HF_HUB_OFFLINE is set, its cache on this machine. Raises UserError when none has it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if str(source) in BUNDLED:
        return BUNDLED[str(source)]
    if path.is_file():
        raise UserError(f"{source} is a file, not a model folder (config.json, model.safetensors)")
    hub = hub_id(source, revision)
    if hub:
        return download(*hub)
    raise UserError(f"no model at {source}: not a folder, and {nearest(str(source), BUNDLED)}")


def read_text(path: str | Path) -> str:
    """The content of a text file that a person wrote; UserError when it is missing or no UTF-8."""
    path = Path(path).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a complete model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): fetch it again") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON as a whole or not at all."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all. A disk that is full is an OSError that names it."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden neighbour of a file, to write to, which then takes its place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def unfinished(folder: Path) -> Iterator[Path]:
    """What a killed process has left in a folder of what it was replacing."""
    return (path for path in folder.glob(".*") if re.fullmatch(r"\..+\.\d+", path.name))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of writing says which file it was: Python's own does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `folder` to this process; UserError while another one does.

    The operating system holds the lock, for the process and not for what it starts: a process that
    was killed leaves none behind. A folder in which nothing came of it goes again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by another process ({file.read() or 'unknown'}): wait for it, "
                f"or stop it"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}")
        file.flush()
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def free_space(folder: Path) -> int:
    """Bytes free on the disk that a folder is on, or will be on."""
    above = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    return shutil.disk_usage(above).free


def check_space(folder: Path, needed: int, what: str) -> None:
    """OSError where the disk of `folder` has fewer bytes left than are `needed`. what: for what,
    with a verb."""
    if (free := free_space(folder)) < needed:
        reason = f"{what} {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, reason, str(folder))


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """SHA-256 of a file, or its hash by another algorithm of hashlib, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def build_config(cls: type[C], content: dict[str, Any], where: str | Path) -> C:
    """A config dataclass from JSON; unknown or missing fields are a UserError that names them."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in content:
        if key not in fields:
            raise UserError(f"{where}: {cls.__name__} has no field {key!r}: {nearest(key, fields)}")
    try:
        return cls(**content)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def save_module(folder: str | Path, module: "nn.Module", config: Any, half: bool = False) -> None:
    """Write `config.json` and `model.safetensors` (float16 if `half`) into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        k: (v.half() if half and v.is_floating_point() else v).cpu().contiguous()
        for k, v in module.state_dict().items()
    }
    with replacing(folder / "model.safetensors") as partial:
        write_tensors(partial, state)
    write_json(
        folder / "config.json", {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}
    )


# What safetensors calls the types of numbers, the widest first, in which order it writes them.
NUMBERS = {
    **{"uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32"},
    **{"int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16"},
    **{"int8": "I8", "uint8": "U8", "bool": "BOOL"},
}


def write_tensors(
    path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file. Unlike the library's own writer, one tensor at a time, so that no
    memory is needed for all of them; and a full disk is an OSError.

    The bytes are the library's: the length of a header, the header (JSON, padded to 8 bytes), the
    numbers, those of wide types first.
    """
    import torch

    order = list(NUMBERS)
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    names = sorted(
        tensors, key=lambda name: (-tensors[name].itemsize, order.index(kinds[name]), name)
    )
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        about = {"dtype": NUMBERS[kinds[name]], "shape": list(tensors[name].shape)}
        header[name] = about | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def load_state(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file; UserError when it is missing, empty or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} is not a complete model")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is empty, truncated or foreign ({error}): fetch it again"
        ) from None


def load_module(folder: str | Path, module_cls: Any, config_cls: type[C]) -> Any:
    """`module_cls(config)` from a folder, in fp32 and eval mode; strict about every tensor."""
    folder = Path(folder)
    content = read_json(folder / "config.json")
    version = content.pop("format_version", None) if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{folder}/config.json: format_version {version} is not {FORMAT_VERSION}")
    config = build_config(config_cls, content, folder / "config.json")
    try:
        module = module_cls(config)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder}/config.json describes no {module_cls.__name__}: {error}"
        ) from None
    load_weights(module, load_state(folder / "model.safetensors"), folder)
    return module.eval()


def load_weights(module: "nn.Module", state: dict[str, Any], where: str | Path) -> None:
    """Copy `state` into `module`: same names, same shapes, nothing left over, or a UserError."""
    own = module.state_dict()
    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape]
    left = [k for k in state if k not in own]
    if wrong or left:
        listed = ", ".join((wrong + left)[:4])
        raise UserError(
            f"{where}: the weights do not fit {type(module).__name__} "
            f"({len(wrong)} missing or of another shape, {len(left)} left over: {listed})"
        )
    module.load_state_dict(state)
