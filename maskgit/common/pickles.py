"""Files of torch.save and of TorchScript, read without executing anything that stands in them.

Such a file is a zip archive: `data.pkl`, a pickle that describes objects, and records `data/N` with
the numbers of the tensors. `maskgit/common/legacy.py` has the formats before that, and
`maskgit/common/unpickle.py` the reader of pickles, which calls nothing that a file names.
"""

import mmap
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.common.errors import UserError
from maskgit.common.legacy import read_stacked, read_tar
from maskgit.common.unpickle import Record as Record
from maskgit.common.unpickle import cut, printable, unpickle

if TYPE_CHECKING:
    import torch

# Items in nested dicts (a pickle can hold one dict a billion times), and the length of a name.
MOST, LONGEST = 1_000_000, 1000
SMALL = range(MOST)  # the numbers that can be part of a name


def read_torch(path: str | Path) -> Any:
    """What a file of torch.save or TorchScript holds: dicts, lists, numbers, strings, tensors.

    A TorchScript archive gives a Record. Tensors are on the CPU and lie in the mapped file, so a
    large one costs no memory before its numbers are looked at; writing to them leaves the file as
    it is. Raises UserError for a file that is damaged, written on a big-endian machine, or that
    names anything but tensors, containers and Records; nothing has run then.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if content[:1] == pickle.PROTO:
            return read_stacked(path, content)
        if content[257:262] == b"ustar":
            return read_tar(path, content)
        return Archive(path, content).load()
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is empty, truncated or no file of torch.save ({printable(error)}): fetch it "
            "again"
        ) from None


def flatten(
    content: Any, where: str | Path = "this file", joint: str = "."
) -> "dict[str, torch.Tensor]":
    """The tensors in nested dicts, by their names, joined with dots or another `joint`.

    Raises UserError, which tells `where`, for dicts that are nested too deep and for tensors whose
    names are no text (or small numbers), too long, or the same.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    seen = 0

    def walk(content: Any, parts: tuple[Any, ...]) -> None:
        nonlocal seen
        seen += len(content)
        if len(parts) > 50 or seen > MOST:
            raise UserError(f"{where}: dicts are nested too deep for a model: fetch it again")
        for key, value in content.items():
            if isinstance(value, torch.Tensor):
                name = _joined((*parts, key), where, joint)
                if name in found:
                    raise UserError(f"{where} has two tensors {name}: fetch it again")
                found[name] = value
            elif isinstance(value, dict):
                walk(value, (*parts, key))

    walk(content, ())
    return found


def _joined(parts: tuple[Any, ...], where: str | Path, joint: str) -> str:
    """A tensor's name from the keys of the dicts around it."""
    texts = [
        str(part)
        for part in parts
        if (type(part) is str and part.isprintable()) or (type(part) is int and part in SMALL)
    ]
    if len(texts) < len(parts) or sum(map(len, texts)) + len(texts) > LONGEST:
        raise UserError(
            f"{where} has tensors whose names are no text of at most {LONGEST} letters: fetch it "
            "again"
        )
    return joint.join(texts)


class Archive:
    """The records of one file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content = path, content
        with zipfile.ZipFile(path) as file:
            listed = file.infolist()
        self.records = {info.filename: info for info in listed}
        if len(self.records) < len(listed):
            raise zipfile.BadZipFile("two records of one name")
        pickles = [name for name in self.records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"{len(pickles)} records data.pkl")
        if sum(info.compress_size for info in self.records.values()) > len(content):
            raise zipfile.BadZipFile("records that overlap")
        self.root = pickles[0].removesuffix("data.pkl")
        self.storages: dict[str, torch.Tensor] = {}

    def load(self) -> Any:
        order = f"{self.root}byteorder" in self.records and self.record("byteorder")
        if order and bytes(order) != b"little":
            raise UserError(f"{self.path} is big-endian: save it on a usual machine")
        return unpickle(self, self.record("data.pkl"))[0]

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
        start, view = max(info.header_offset, 0), memoryview(b"")
        header = self.content[start : start + 30]
        if header.startswith(b"PK\x03\x04") and len(header) == 30:
            start += 30 + sum(struct.unpack("<HH", header[26:]))
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
        return cut(self, key, self.storages[key], kind, count)
