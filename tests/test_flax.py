"""Files of flax: arrays read exactly; bombs, cuts and flips refused in one line."""

import random
import subprocess
import sys

import msgpack
import pytest
import torch
from conftest import ROOT, one_line
from tiny_published import flax_bytes

from maskgit.common import UserError
from maskgit.common.flax import ENTRIES, MAPS, read_flax


def put(path, content):
    path.write_bytes(content)
    return path


def ext(shape, name="float32", numbers=b"", code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, name, numbers)))


@pytest.mark.parametrize("chunk", [None, 5])
def test_arrays_come_back(tmp_path, chunk):
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
    content = {
        **{f"params/kinds/{kind}": torch.arange(6).to(getattr(torch, kind)) for kind in kinds},
        "params/kinds/bool": torch.tensor([True, False]),
        "params/kinds/uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "params/Conv_0/kernel": torch.randn(3, 3, 2, 4),
        "params/Conv_0/bias": torch.randn(4),
        "scale": torch.tensor(2.5),
        "none": torch.empty(0, 3),
    }
    found = read_flax(put(tmp_path / "a", flax_bytes(content, chunk)))
    assert list(found) == list(content)
    for name, tensor in content.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape


def test_the_bytes_are_those_that_the_format_fixes(tmp_path):
    """Written by hand from its description, not by the helper of these tests."""
    numbers = b"\x00\x00\x80\x3f\x00\x00\x00\x40"  # 1.0, 2.0
    array = b"\x93" + b"\x92\x01\x02" + b"\xa7float32" + b"\xc4\x08" + numbers
    whole = b"\x82" + b"\xa6params\x81\xa1w\xc7" + bytes([len(array)]) + b"\x01" + array
    whole += b"\xa4step\xcd\x01\x00"
    found = read_flax(put(tmp_path / "a", whole))
    assert list(found) == ["params/w"]
    assert found["params/w"].tolist() == [[1, 2]]


def test_numbers_of_numpy_and_what_is_no_array(tmp_path):
    content = {"a": ext((), "int32", b"\x05\0\0\0", code=3), "b": 1.5, "c": None, "d": "x"}
    found = read_flax(put(tmp_path / "a", msgpack.packb(content)))
    assert {name: tensor.item() for name, tensor in found.items()} == {"a": 5}


def nested(depth):
    content = {"a": ext((0,))}
    for _ in range(depth):
        content = {"a": content}
    return content


BAD = {
    "empty": b"",
    "text": b"hello",
    "a list": msgpack.packb([1, 2]),
    "a number": msgpack.packb(1),
    "more behind": msgpack.packb({"a": 1}) + b"\x00",
    "a shape": msgpack.packb({"a": ext((3,), numbers=bytes(8))}),
    "half a number": msgpack.packb({"a": ext((1,), numbers=bytes(3))}),
    "negative": msgpack.packb({"a": ext((-1, -1), numbers=bytes(4))}),
    "a shape of text": msgpack.packb({"a": ext("ab", numbers=bytes(4))}),
    "truth": msgpack.packb({"a": ext((True,), numbers=bytes(4))}),
    "huge": msgpack.packb({"a": ext((1 << 40, 1 << 40), numbers=bytes(4))}),
    "objects": msgpack.packb({"a": ext((1,), "object", bytes(8))}),
    "a type": msgpack.packb({"a": ext((1,), "float32, (10000000,)", bytes(8))}),
    "torch's": msgpack.packb({"a": ext((1,), "load", bytes(8))}),
    "kind": msgpack.packb({"a": ext((1,), numbers=bytes(4), code=2)}),
    "no array": msgpack.packb({"a": msgpack.ExtType(1, b"\xff")}),
    "an array in it": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([ext((0,))]))}),
    "keys": msgpack.packb({1: {"a": 1}}),
    "chunks": msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}}),
    "no chunks": msgpack.packb({"a": {"__msgpack_chunked_array__": True}}),
    "numbers": msgpack.packb(
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 1}, "chunks": {"0": 1}}}
    ),
    "deep": msgpack.packb(nested(51)),
    "a list in it": msgpack.packb({"a": ext((0,)), "b": [1]}),  # flax writes lists as maps
    "two of a name": b"\x82" + 2 * msgpack.packb({"a": ext((0,))})[1:],
    "joined alike": msgpack.packb({"a": {"b": ext((0,))}, "a/b": ext((0,))}),
    "bytes": msgpack.packb({b"a": ext((0,))}),
    "long names": msgpack.packb({"x" * 600: {"y" * 600: ext((0,))}}),
    # Sizes that stand in the file and nothing behind them, and much of little.
    "list bomb": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "lists bomb": b"\x81\xa1a" + b"\xdd\x00\x0f\xff\xff" * 400 + bytes(1 << 20),
    "map bomb": b"\xdf\xff\xff\xff\xff",
    "text bomb": b"\x81\xdb\xff\xff\xff\xff",
    "bytes bomb": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "array bomb": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "deep bomb": b"\x81\xa1a" * 100_000,
    "deep lists": b"\x81\xa1a" + b"\x91" * 100_000,
    "wide": msgpack.packb({str(i): 0 for i in range(ENTRIES + 1)}),
    "many": msgpack.packb(
        {str(i): {str(k): {} for k in range(ENTRIES)} for i in range(MAPS // ENTRIES + 1)}
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(tmp_path, name):
    with pytest.raises(UserError) as error:
        read_flax(put(tmp_path / "a.msgpack", BAD[name]))
    one_line(error, "a.msgpack", "fetch it again")


def test_bombs_take_no_memory(tmp_path):
    """Each of them in a process that has little more than msgpack and torch need."""
    for i, content in enumerate(BAD.values()):
        put(tmp_path / f"{i}", content)
    code = f"""
import resource, sys, torch, msgpack
from maskgit.common import UserError
from maskgit.common.flax import read_flax
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_flax_before = peak()
for i in range({len(BAD)}):
    try:
        read_flax(f"{tmp_path}/{{i}}")
    except UserError:
        pass
print(peak() - read_flax_before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000  # KB


CONTENT = flax_bytes({"params/a/kernel": torch.randn(4, 6), "params/a/bias": torch.randn(6)}, 20)


def test_truncated_anywhere(tmp_path):
    for at in range(len(CONTENT)):
        with pytest.raises(UserError) as error:
            read_flax(put(tmp_path / "a", CONTENT[:at]))
        one_line(error, "a")


def test_flipped_anywhere(tmp_path):
    """There is no checksum: a flip in a number gives another one."""
    generator, refused = random.Random(0), 0
    for _ in range(400):
        changed = bytearray(CONTENT)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        try:
            found = read_flax(put(tmp_path / "a", bytes(changed)))
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 50 < refused < 400


def test_no_file(tmp_path):
    with pytest.raises(UserError) as error:
        read_flax(tmp_path / "nowhere")
    one_line(error, "nowhere")
