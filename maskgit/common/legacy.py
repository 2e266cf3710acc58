"""Files of torch.save from before 1.6, read without executing anything that stands in them.

**Stacked** (0.2 to 1.5): pickles one after the other, of a magic number, a version, the machine,
the object and the keys of its storages; then the storages in the order of these keys, each a count
of 8 bytes and its numbers. The object says which numbers a storage has, so its pickle is read
twice: for the sizes, then with the storages in place.

**Tar** (before 0.2): `storages` and `tensors`, a pickled count and so many entries, each a pickle
and then numbers; and `pickle`, the object, which names its tensors by their keys.
"""

import io
import mmap
import struct
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.common.errors import UserError
from maskgit.common.unpickle import (
    LARGEST,
    STUMBLES,
    Reader,
    Source,
    cut,
    printable,
    unpickle,
)

if TYPE_CHECKING:
    import torch

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
SMALL = 1 << 12  # bytes of what stands before the numbers of a tar's storage or tensor


def read_stacked(path: Path, content: mmap.mmap) -> Any:
    """The object in a stacked file; UserError if it is another pickle, damaged or big-endian."""
    sizes = Sizes(path)
    magic, at = unpickle(sizes, content)
    if type(magic) is not int or magic != MAGIC:
        raise UserError(
            f"{path} is a pickle that torch did not write: torch.save it, and pass that"
        )
    version, at = unpickle(sizes, content, at)
    machine, start = unpickle(sizes, content, at)
    if version != VERSION or not isinstance(machine, dict) or not machine.get("little_endian"):
        raise UserError(f"{path} is big-endian or of no version known: save it with a newer torch")
    _, at = unpickle(sizes, content, start)
    keys, at = unpickle(sizes, content, at)
    named = isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)
    if not named or set(map(str, keys)) != set(sizes.found):
        raise UserError(f"{path} does not list its storages as it names them: fetch it again")
    storages = Storages(path)
    for key in map(str, keys):
        kind, count = sizes.found[key]
        storages.found[key], at = _numbers(path, content, at, kind, count)
    return unpickle(storages, content, start)[0]


class Sizes:
    """Storages without numbers, to learn which there are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, tuple[torch.dtype, int]] = {}

    def storage(self, key: str, kind: "torch.dtype", count: int) -> "torch.Tensor":
        import torch

        stored = torch.empty(count, dtype=kind, device="meta")
        if self.found.setdefault(key, (kind, count)) != (kind, count):
            raise UserError(f"{self.path}: storage {printable(key)} is of two kinds or sizes")
        return stored


class Storages:
    """The storages of a file, as flat tensors of bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, torch.Tensor] = {}

    def storage(self, key: str, kind: "torch.dtype", count: int) -> "torch.Tensor":
        return cut(self, key, self.found[key], kind, count)


def _numbers(
    path: Path,
    content: "mmap.mmap | memoryview",
    at: int,
    kind: "torch.dtype",
    count: int | None = None,
) -> tuple["torch.Tensor", int]:
    """The bytes of the storage at `at`, where they lie in the file, and where it ends; UserError
    if it does not have `count` numbers."""
    import torch

    size = -1
    if at + 8 <= len(content):
        (stated,) = struct.unpack_from("<q", content, at)
        size = stated * kind.itemsize
    view = memoryview(content)[at + 8 : at + 8 + max(size, 0)]
    if size < 0 or len(view) < size or (count is not None and stated != count):
        raise UserError(f"{path} is truncated or damaged at byte {at}: fetch it again")
    flat = torch.frombuffer(view, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
    return flat, at + 8 + size


def read_tar(path: Path, content: mmap.mmap) -> Any:
    """The object in a tar file of torch's; UserError if it is another tar, or damaged."""
    try:
        with tarfile.open(fileobj=content, mode="r:") as tar:  # type: ignore[call-overload]
            members = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in tar if m.isreg()}
        parts = {}
        for name in ("storages", "tensors", "pickle"):
            start, size = members[name]
            parts[name] = memoryview(content)[start : start + size]
            if len(parts[name]) < size:
                raise EOFError(f"{name} is truncated")
        named = _tensors(path, parts["tensors"], _storages(path, parts["storages"]))
        return Named(named, Storages(path), io.BytesIO(parts["pickle"][:LARGEST])).load()
    except (*STUMBLES, tarfile.TarError) as error:
        raise UserError(
            f"{path} is a damaged tar, or none that torch wrote ({printable(error)}): fetch it "
            "again"
        ) from None


def _storages(path: Path, content: memoryview) -> "dict[int, torch.Tensor]":
    """The storages of a tar, and the parts of them that have keys of their own."""
    source, found = Storages(path), {}
    count, at = unpickle(source, content)
    for _ in range(count):
        (key, _, kind), at = unpickle(source, content, at, SMALL)
        flat, at = _numbers(path, content, at, kind)
        found[int(key)] = cut(source, str(int(key)), flat, kind, len(flat) // kind.itemsize)
    for key, root, offset, size in unpickle(source, content, at)[0]:
        whole = found[int(root)]
        if min(offset, size) < 0 or offset + size > len(whole):
            raise ValueError("a part of a storage lies outside it")
        found[int(key)] = whole[offset : offset + size]
    return found


def _tensors(
    path: Path, content: memoryview, storages: "dict[int, torch.Tensor]"
) -> "dict[int, torch.Tensor]":
    """All that a tar's object can name: its storages, and its tensors, which lie in them."""
    reader, found = Reader(Storages(path), io.BytesIO()), dict(storages)
    count, at = unpickle(reader.source, content)
    for _ in range(count):
        (key, storage, _), at = unpickle(reader.source, content, at, SMALL)
        (dimensions,) = struct.unpack_from("<i4x", content, at)
        if not 0 <= dimensions <= 64:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        *layout, offset = struct.unpack_from(f"<{2 * dimensions + 1}q", content, at + 8)
        size, stride = layout[:dimensions], layout[dimensions:]
        found[int(key)] = reader.tensor(storages[int(storage)], offset, size, stride)
        at += 16 + 16 * dimensions
    return found


class Named(Reader):
    """The reader of a tar's object, whose tensors have keys."""

    def __init__(self, named: "dict[int, torch.Tensor]", source: Source, file: io.BytesIO) -> None:
        super().__init__(source, file)
        self.named = named

    def persistent_load(self, saved: Any) -> Any:
        return self.named[int(saved)]
