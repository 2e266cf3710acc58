"""Files of torch.save and of TorchScript, read without executing anything that stands in them.

Such a file is a zip archive: `data.pkl`, a pickle that describes objects, and records `data/N` with
the numbers of the tensors. A pickle can call any function that it names, so this reader knows a
handful of names that make tensors and containers, and refuses a file with any other. What a
TorchScript archive says of its own classes becomes a `Record`: attributes, and no code.
"""

import mmap
import pickle
import struct
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from maskgit.common.errors import UserError

if TYPE_CHECKING:
    import torch

# What a storage of torch.save is called, and the type of its numbers.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
# What a pickle that no torch wrote makes the unpickler stumble over.
STUMBLES = (
    *(pickle.UnpicklingError, struct.error, EOFError, LookupError, OverflowError),
    *(AttributeError, RuntimeError, TypeError, ValueError),
)


class Record(dict[str, Any]):
    """An object of a class that only the archive knows: its attributes by name."""


def read_torch(path: str | Path) -> Any:
    """What a file of torch.save or TorchScript holds: dicts, lists, numbers, strings, tensors.

    A TorchScript archive gives a Record. Tensors are on the CPU and lie in the mapped file, so a
    large one costs no memory before its numbers are looked at; writing to them leaves the file as
    it is. Raises UserError for a file that is damaged, of torch's format from before 1.6, written
    on a big-endian machine, or that names anything but tensors and containers; nothing has run
    then.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(1) == pickle.PROTO and not zipfile.is_zipfile(path):
                raise UserError(
                    f"{path} is a pickle or of torch's format from before 1.6: where it comes "
                    "from, load it, torch.save it with a newer torch, and pass that file"
                )
            return Archive(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)).load()
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is empty, truncated or no file of torch.save ({error}): fetch it again"
        ) from None


def flatten(content: Any, prefix: str = "") -> "dict[str, torch.Tensor]":
    """The tensors in nested dicts, by their names joined with dots."""
    import torch

    if prefix.count(".") > 50:
        raise UserError(f"{prefix[:40]}... is nested too deep: this file holds no model")
    found = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, dict):
            found.update(flatten(value, f"{prefix}{name}."))
    return found


class Archive:
    """The records of one file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content = path, content
        with zipfile.ZipFile(path) as file:
            self.records = {info.filename: info for info in file.infolist()}
        pickles = [name for name in self.records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"{len(pickles)} records data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")
        self.storages: dict[str, torch.Tensor] = {}

    def load(self) -> Any:
        try:
            order = f"{self.root}byteorder" in self.records and self.record("byteorder")
            if order and bytes(order) != b"little":
                raise UserError(f"{self.path} is big-endian: save it on a usual machine")
            return Reader(self, self.record("data.pkl")).load()
        except STUMBLES as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.path}: its pickle is damaged ({reason}): fetch the file again"
            ) from None

    def record(self, name: str) -> memoryview:
        """The bytes of a record, where they lie in the file."""
        info = self.records.get(f"{self.root}{name}")
        if info is None:
            raise UserError(f"{self.path}: record {name} is missing: fetch the file again")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UserError(
                f"{self.path}: record {name} is compressed, which torch never does: pass the file "
                "as torch wrote it"
            )
        # The local header has 30 bytes, then a name and padding whose lengths it ends with.
        lengths = struct.unpack_from("<HH", self.content, info.header_offset + 26)
        start = info.header_offset + 30 + sum(lengths)
        view = memoryview(self.content)[start : start + info.file_size]
        if len(view) < info.file_size or (info.CRC and zlib.crc32(view) != info.CRC):
            raise UserError(f"{self.path}: record {name} is damaged: fetch the file again")
        return view

    def storage(self, key: str, kind: "torch.dtype", count: int) -> "torch.Tensor":
        """`count` numbers of a record, as a flat tensor."""
        import torch

        if key not in self.storages:
            view = self.record(f"data/{key}")
            content = torch.frombuffer(view, dtype=torch.uint8) if view else torch.empty(0)
            self.storages[key] = content
        stored, size = self.storages[key], count * kind.itemsize
        if count < 0 or size > len(stored):
            raise UserError(
                f"{self.path}: storage {key} of {count} numbers needs {size} bytes, and its record "
                f"has {len(stored)}"
            )
        if count == 0:
            return torch.empty(0, dtype=kind)
        stored = stored[:size]
        if stored.data_ptr() % kind.itemsize:  # another writer's zip need not align them
            stored = stored.clone()
        return stored.view(kind)


class Reader(pickle._Unpickler):
    """Python's own unpickler, with a list of what it may call.

    The one written in Python: in C, an index in the file decides how much memory is taken.
    """

    def __init__(self, archive: Archive, content: memoryview) -> None:
        import io

        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.archive = archive

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (Record,), {})
        if module in ("torch", "torch.storage") and name in STORAGES:
            return getattr(torch, STORAGES[name])
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): torch.Size,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in LISTS},
            ("torch.jit._pickle", "restore_type_tag"): _untagged,
        }
        if (module, name) not in allowed:
            module = IMPORT_MAPPING.get(module, module)  # torch.save writes the names of Python 2
            raise UserError(
                f"{self.archive.path} is refused: it names {module}.{name}, which could execute "
                "code; nothing of it has run. Pass a file that holds weights only"
            )
        return allowed[module, name]

    def persistent_load(self, saved: Any) -> Any:
        kind, dtype, key, _, count = saved
        if kind != "storage":
            raise UserError(f"{self.archive.path}: a persistent {kind!r}, which torch never writes")
        return self.archive.storage(str(key), dtype, count)

    def tensor(self, storage: "torch.Tensor", offset: int, size: Any, stride: Any, *_: Any) -> Any:
        """What `torch._utils._rebuild_tensor_v2` makes, inside its storage."""
        import math

        size, stride = tuple(size), tuple(stride)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or math.prod(size) > len(storage):
            last = -1
        if math.prod(size) and not 0 <= last < len(storage):
            raise UserError(
                f"{self.archive.path}: a tensor of {size} and strides {stride} from {offset} does "
                f"not lie in its storage of {len(storage)} numbers"
            )
        return storage.as_strided(size, stride, offset if math.prod(size) else 0)

    def load_build(self) -> None:
        """Attributes are given to Records; what else would get some (an OrderedDict's) does not."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state, target = stack.pop(), stack[-1]
        if isinstance(target, Record) and isinstance(state, dict):
            target.update(state)

    # Without the one instruction that takes memory by a number in the file.
    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
    del dispatch[pickle.BYTEARRAY8[0]]


LISTS = ("int", "double", "bool", "tensor")


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _untagged(value: Any, *_: Any) -> Any:
    return value
