"""Files of flax.serialization: msgpack, read with bounds on all that such a file can ask for.

A file is a map of maps. An array is msgpack's extension type 1 (3: one that is a single number),
which holds a msgpack of its own: shape, name of the numbers' type, and the numbers in C order. One
of more than 2^30 bytes is a map of chunks instead, see `CHUNKED`.
"""

import math
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.common.errors import UserError
from maskgit.common.pickles import flatten
from maskgit.common.unpickle import printable

if TYPE_CHECKING:
    import torch

ARRAYS = (1, 3)
NUMBERS = (
    *("float64", "float32", "float16", "bfloat16", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
)
# {CHUNKED: True, "shape": {"0": rows, ...}, "chunks": {"0": flat array, ...}}
CHUNKED = "__msgpack_chunked_array__"
# What one file may have. Sizes are taken by msgpack before it sees what they are the sizes of.
MAPS, ENTRIES, DIMENSIONS, NAME = 100_000, 4096, 32, 1024


def read_flax(path: str | Path) -> "dict[str, torch.Tensor]":
    """The arrays of a flax file by their names, joined with "/": "params/encoder/Conv_0/kernel".

    What is no array, such as a step's number, is left out. Raises UserError for a file that is
    damaged or no such file, for one that asks for more than models do, and where `flatten` does.
    """
    import msgpack

    path, maps = Path(path), 0

    def mapped(pairs: list[tuple[str, Any]]) -> Any:
        nonlocal maps
        maps += 1
        content = dict(pairs)
        if maps > MAPS or len(content) < len(pairs):
            raise ValueError(f"more than {MAPS:,} maps, or two of one name in a map")
        return _whole(content) if CHUNKED in content else content

    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            content = msgpack.unpackb(
                whole,
                ext_hook=_array,
                object_pairs_hook=mapped,
                strict_map_key=True,
                max_str_len=NAME,
                max_array_len=0,  # flax writes lists as maps
                max_map_len=ENTRIES,
            )
        if not isinstance(content, dict):
            raise ValueError("no map of arrays")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        RuntimeError,
        msgpack.UnpackException,
    ) as e:
        raise UserError(
            f"{path} is empty, truncated or no file of flax "
            f"({printable(e) or type(e).__name__}): fetch it again"
        ) from None
    return flatten(content, path, "/")


def _array(code: int, content: bytes) -> "torch.Tensor":
    """What one of msgpack's extensions holds."""
    import msgpack
    import torch

    if code not in ARRAYS:
        raise ValueError(f"an object of kind {code}, which is no array")
    shape, name, numbers = msgpack.unpackb(
        content, raw=True, max_array_len=DIMENSIONS, max_map_len=0, max_ext_len=0
    )
    name = name.decode()
    if name not in NUMBERS:
        raise ValueError(f"numbers of type {name}")
    return _shaped(_flat(numbers, getattr(torch, name)), shape)


def _flat(numbers: bytes, kind: "torch.dtype") -> "torch.Tensor":
    import torch

    if len(numbers) % kind.itemsize:
        raise ValueError(f"{len(numbers)} bytes for numbers of {kind.itemsize}")
    return torch.frombuffer(bytearray(numbers), dtype=kind) if numbers else torch.empty(0).to(kind)


def _shaped(flat: "torch.Tensor", shape: Any) -> "torch.Tensor":
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError("a shape of other things than sizes")
    if math.prod(shape) != len(flat):
        raise ValueError(f"{len(flat)} numbers for the shape {tuple(shape)}")
    return flat.view(tuple(shape))


def _whole(content: dict[str, Any]) -> "torch.Tensor":
    """The array in chunks that a map stands for."""
    import torch

    chunks, sides = content["chunks"], content["shape"]
    flat = torch.cat([chunks[str(i)] for i in range(len(chunks))])
    return _shaped(flat, [sides[str(i)] for i in range(len(sides))])
