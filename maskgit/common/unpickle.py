"""A pickle, read without executing anything that stands in it.

A pickle can call any function that it names, so this reader knows a handful of names that make
tensors and containers, and refuses a file with any other. What a TorchScript archive says of its
own classes becomes a `Record`, attributes and no code, and so does what a training checkpoint keeps
beside its weights: settings and counters of Lightning, argparse, OmegaConf, dates, and NumPy's
numbers and arrays.
"""

import io
import math
import mmap
import pickle
import re
import struct
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

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
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
LISTS = ("int", "double", "bool", "tensor")
# What is read as Records: the classes of these modules, by a class's usual name, and single names.
# No module is imported for them.
INERT = re.compile(r"(pytorch_lightning|lightning(_fabric|_lite)?|omegaconf)(\.\w+)*:[A-Z]\w*")
BUILTINS = (
    "bool",
    "bytearray",
    "bytes",
    "complex",
    "dict",
    "float",
    "int",
    "list",
    "long",
    "set",
    "str",
    "tuple",
    "unicode",
)
INERT_NAMES = {
    *(("argparse", "Namespace"), ("numpy", "dtype"), ("_codecs", "encode"), ("typing", "Any")),
    *(("collections", "Counter"), ("collections", "defaultdict"), ("pathlib", "PosixPath")),
    *(("torch", "device"), ("torch.serialization", "_get_layout"), ("numpy", "ndarray")),
    *((f"numpy.{x}.multiarray", y) for x in ("core", "_core") for y in ("scalar", "_reconstruct")),
    *(("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *((module, name) for module in ("builtins", "__builtin__") for name in BUILTINS),
}
LARGEST = 1 << 24  # bytes of a pickle; a model of 50,000 tensors has some 10 MB
# What a pickle that no torch wrote makes the unpickler stumble over.
STUMBLES = (
    *(pickle.UnpicklingError, struct.error, EOFError, LookupError, OverflowError),
    *(AttributeError, RuntimeError, TypeError, ValueError),
)


class Record(dict[str, Any]):
    """An object of a class that is not known here: its attributes by name, or its items."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """What the class would have been called with is of no interest."""


class Source(Protocol):
    """Where a pickle's storages come from."""

    path: Path

    def storage(self, key: str, kind: "torch.dtype", count: int) -> "torch.Tensor":
        """`count` numbers that the file has under `key`, as a flat tensor."""


def printable(text: object) -> str:
    """A line, as long as a person reads, of what a file says."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:160])


def unpickle(
    source: Source, content: "memoryview | mmap.mmap", start: int = 0, most: int = LARGEST
) -> tuple[Any, int]:
    """The object pickled at `start`, and where its pickle ends; UserError if it is damaged, or
    has more than `most` bytes."""
    file = io.BytesIO(content[start : start + most])
    reader = Reader(source, file)
    try:
        return reader.load(), start + file.tell()
    except STUMBLES as error:
        reason = printable(error) or type(error).__name__
        raise UserError(
            f"{source.path}: its pickle is damaged ({reason}): fetch the file again"
        ) from None
    finally:
        vars(reader).clear()  # it refers to itself, and so would keep all that it has read


def cut(source: Source, key: str, stored: "torch.Tensor", kind: "torch.dtype", count: int) -> Any:
    """The first `count` numbers of a storage's bytes, as a flat tensor."""
    import torch

    size = count * kind.itemsize
    if count < 0 or size > len(stored):
        raise UserError(
            f"{source.path}: storage {printable(key)} of {count} numbers needs {size} bytes, and "
            f"its record has {len(stored)}"
        )
    if count == 0:
        return torch.empty(0, dtype=kind)
    stored = stored[:size]
    if stored.data_ptr() % kind.itemsize:  # other writers, and older formats, need not align them
        stored = stored.clone()
    return stored.view(kind)


class Reader(pickle._Unpickler):
    """Python's own unpickler, with a list of what it may call.

    The one written in Python: in C, an index in the file decides how much memory is taken.
    """

    def __init__(self, source: Source, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.source, self.file, self.copies = source, file, 0

    def find_class(self, module: str, name: str) -> Any:
        import torch

        own = module == "__torch__" or module.startswith("__torch__.")
        if own or INERT.fullmatch(f"{module}:{name}") or (module, name) in INERT_NAMES:
            return Record
        if module in ("torch", "torch.storage") and name in STORAGES:
            return getattr(torch, STORAGES[name])
        if module == "torch" and name.replace("Tensor", "Storage") in STORAGES:  # before 0.2
            return getattr(torch, STORAGES[name.replace("Tensor", "Storage")])
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        allowed = {
            ("collections", "OrderedDict"): self.ordered,
            ("torch", "Size"): self.size,
            ("torch._utils", "_rebuild_tensor"): self.tensor,  # before 0.4
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): _first,
            **{("torch.jit._pickle", f"build_{kind}list"): _first for kind in LISTS},
            ("torch.jit._pickle", "restore_type_tag"): _first,
        }
        if (module, name) not in allowed:
            module = IMPORT_MAPPING.get(module, module)  # torch.save writes the names of Python 2
            raise UserError(
                f"{self.source.path} is refused: it names {printable(f'{module}.{name}')}, which "
                "could execute code; nothing of it has run. Pass a file that holds weights only"
            )
        return allowed[module, name]

    def persistent_load(self, saved: Any) -> Any:
        kind, dtype, key, _, count, *view = saved
        if kind != "storage" or not isinstance(key, str | int):
            raise UserError(f"{self.source.path}: it asks for what torch never writes: no storage")
        stored = self.source.storage(str(key), dtype, count)
        if view and view[0]:  # before 0.4, a part of a storage could be one
            _, start, size = view[0]
            if min(start, size) < 0 or start + size > len(stored):
                raise UserError(f"{self.source.path}: a part of storage {key} lies outside it")
            stored = stored[start : start + size]
        return stored

    def tensor(self, storage: "torch.Tensor", offset: int, size: Any, stride: Any, *_: Any) -> Any:
        """What `torch._utils._rebuild_tensor_v2` makes, inside its storage."""
        if storage.ndim != 1 or not storage.is_contiguous():
            raise UserError(f"{self.source.path}: a tensor of which another one is made")
        if len(size) > 64:
            raise UserError(f"{self.source.path}: a tensor of {len(size)} dimensions")
        size, stride = tuple(size), tuple(stride)
        if any(type(n) is not int or n.bit_length() > 63 for n in (offset, *size, *stride)):
            raise UserError(f"{self.source.path}: a tensor of other sides than torch has")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or math.prod(size) > len(storage):
            last = -1
        if math.prod(size) and not 0 <= last < len(storage):
            raise UserError(
                f"{self.source.path}: a tensor of {printable(size)} and strides "
                f"{printable(stride)} from {offset} does not lie in its storage of {len(storage)} "
                "numbers"
            )
        # as_strided counts from where the memory begins, and a part of a storage does not there.
        start = storage.storage_offset() + (offset if math.prod(size) else 0)
        return storage.as_strided(size, stride, start)

    def load_build(self) -> None:
        """Attributes are given to Records; what else would get some (an OrderedDict's) does not."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state, target = stack.pop(), stack[-1]
        if isinstance(target, Record) and isinstance(state, dict):
            target.update(self.copied(state))

    def copied(self, items: Any) -> Any:
        """`items`, to be copied: no more of them in all than there are bytes of the pickle so far,
        as a few bytes can name a long list once more."""
        self.copies += len(items)
        if self.copies > self.file.tell():
            raise pickle.UnpicklingError("little that stands for much")
        return items

    def ordered(self, items: Any = ()) -> OrderedDict[Any, Any]:
        found: OrderedDict[Any, Any] = OrderedDict()
        _fill(found, [part for key, value in self.copied(items) for part in (key, value)])
        return found

    def size(self, sides: Any = ()) -> "torch.Size":
        import torch

        return torch.Size(self.copied(sides))

    def load_setitem(self) -> None:
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        items = stack[-2:]
        del stack[-2:]
        _fill(stack[-1], items)

    def load_setitems(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        _fill(self.stack[-1], items)  # type: ignore[attr-defined]

    def load_dict(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.append({})  # type: ignore[attr-defined]
        _fill(self.stack[-1], items)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
    }
    # One takes memory by a number in the file; sets hash what is in them, see `_fill`.
    for instruction in (pickle.BYTEARRAY8, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[instruction[0]]


def _fill(target: Any, items: list[Any]) -> None:
    """Give a dict its items. Tuples of tuples are no keys: a few bytes describe one that takes
    forever to hash."""
    if not isinstance(target, dict):
        raise pickle.UnpicklingError("items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
            raise pickle.UnpicklingError("a dict by nested tuples")
        target[key] = value


def _first(value: Any, *_: Any) -> Any:
    """What torch's functions around tensors come to, for one who only reads the numbers."""
    return value
