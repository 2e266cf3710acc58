"""torch's formats from before 1.6: read as torch reads them, or refused in one line."""

import io
import pickle
import random
import struct
import tarfile
from collections import OrderedDict

import pytest
import torch
from conftest import one_line
from tiny_published import stacked_bytes, tar_bytes

from maskgit.common import UserError
from maskgit.common.legacy import MAGIC, VERSION
from maskgit.common.pickles import flatten, read_torch
from maskgit.common.unpickle import Record


def put(path, content):
    path.write_bytes(content)
    return path


def test_stacked_pickles_are_equal_to_torch_load(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    kinds = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    content = {
        "state_dict": OrderedDict(
            **{kind: torch.arange(5).to(getattr(torch, kind)) for kind in kinds},
            **{"rows": base, "turned": base.T, "part": base[1:3, 2:4], "scalar": torch.tensor(2.5)},
            **{"none": torch.empty(0, 3), "weight": torch.nn.Parameter(base)},
        ),
        **{"epoch": 3, "name": "ä", "more": [1, (2, None, True)]},
    }
    path = put(tmp_path / "a.pth", stacked_bytes(content))
    found, expected = read_torch(path), torch.load(path, weights_only=True)
    assert list(found) == list(content)
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor), name
        assert found["state_dict"][name].dtype == tensor.dtype
        assert found["state_dict"][name].stride() == tensor.stride()
    assert [found[name] for name in ("epoch", "name", "more")] == [3, "ä", [1, (2, None, True)]]
    before = path.read_bytes()
    found["state_dict"]["rows"].fill_(1)
    assert path.read_bytes() == before


class Storage:
    """Pickled as the name of a storage, with whatever stands behind it."""

    def __init__(self, *content):
        self.content = ("storage", *content)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.content if isinstance(value, Storage) else None


class Tensor:
    def __init__(self, *layout):
        self.layout = layout

    def __reduce__(self):
        return torch._utils._rebuild_tensor, self.layout


def stacked(content, storages, machine=None, magic=MAGIC, keys=None):
    """A stacked file of any pickle: `storages` are by key bytes with their count in front."""
    file = io.BytesIO()
    for part in (magic, VERSION, machine or {"little_endian": True}):
        pickle.dump(part, file, 2)
    Pickler(file, 2).dump(content)
    pickle.dump(list(storages) if keys is None else keys, file, 2)
    file.write(b"".join(storages.values()))
    return file.getvalue()


def numbers(count):
    return struct.pack("<q", count) + torch.arange(float(count)).numpy().tobytes()


def test_a_part_of_a_storage_can_be_one(tmp_path):
    """As in the files of 0.2 and 0.3, which had no stride of their own there."""
    view = Storage(torch.FloatStorage, "7", "cpu", 6, ("8", 2, 3))
    content = Tensor(view, 0, (3,), (1,))
    path = put(tmp_path / "a.pth", stacked(content, {"7": numbers(6)}))
    assert read_torch(path).tolist() == [2, 3, 4]
    for view in (("8", 2, 5), ("8", -1, 3), ("8", 1, -1), ("8", 1 << 62, 1 << 62)):
        content = Tensor(Storage(torch.FloatStorage, "7", "cpu", 6, view), 0, (3,), (1,))
        put(path, stacked(content, {"7": numbers(6)}))
        with pytest.raises(UserError) as error:
            read_torch(path)
        one_line(error, "a.pth")


def test_stacked_files_that_contradict_themselves(tmp_path):
    tensor = Tensor(Storage(torch.FloatStorage, "7", "cpu", 4, None), 0, (4,), (1,))
    other = Tensor(Storage(torch.FloatStorage, "7", "cpu", 3, None), 0, (3,), (1,))
    huge = Tensor(Storage(torch.FloatStorage, "7", "cpu", 1 << 60, None), 0, (4,), (1,))
    good = {"7": numbers(4)}
    assert read_torch(put(tmp_path / "a.pth", stacked(tensor, good))).tolist() == [0, 1, 2, 3]
    cases = [
        (stacked(tensor, good, magic=5), "that torch did not write"),
        (pickle.dumps({"a": 1}, 2), "that torch did not write"),
        (stacked(tensor, good, {"little_endian": False}), "big-endian"),
        (stacked(tensor, good, keys=["8"]), "does not list its storages"),
        (stacked(tensor, good, keys="7"), "does not list its storages"),
        (stacked(tensor, good, keys=[(1, 2)]), "does not list its storages"),
        (stacked(tensor, {"7": numbers(3)}), "truncated or damaged"),
        (stacked(tensor, {"7": struct.pack("<q", -4)}), "truncated or damaged"),
        (stacked(tensor, {"7": b"\x04"}), "truncated or damaged"),
        (stacked([tensor, other], good), "of two kinds or sizes"),
        (stacked(huge, {"7": struct.pack("<q", 1 << 60)}), ""),
    ]
    for content, part in cases:
        with pytest.raises(UserError) as error:
            read_torch(put(tmp_path / "a.pth", content))
        one_line(error, "a.pth", part)


def test_the_tar_of_before_0_2(tmp_path):
    content = {"a.weight": torch.randn(3, 4, 2), "b": torch.arange(5), "c": torch.tensor(2.5)}
    path = put(tmp_path / "a.pth", tar_bytes(content, {"epoch": 3}))
    found = read_torch(path)
    assert flatten(found).keys() == content.keys() and found["epoch"] == 3
    for name, tensor in content.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    theirs = torch.load(path, weights_only=False)  # made here, and holds tensors only
    assert all(torch.equal(theirs[name], tensor) for name, tensor in content.items())


def test_tars_that_are_no_models(tmp_path):
    content = {"a": torch.arange(6.0)}
    good = tar_bytes(content)
    with tarfile.open(fileobj=io.BytesIO(good)) as tar:
        layout = tar.getmember("tensors").offset_data + len(pickle.dumps(1, 2))
    layout = good.index(struct.pack("<i4x", 1), layout)
    ways = {
        "dimensions": good[:layout] + struct.pack("<i", 1 << 30) + good[layout + 4 :],
        "size": good[: layout + 8] + struct.pack("<q", 7) + good[layout + 16 :],
        "negative": good[: layout + 8] + struct.pack("<q", -6) + good[layout + 16 :],
        "offset": good[: layout + 24] + struct.pack("<q", 1) + good[layout + 32 :],
    }
    with tarfile.open(tmp_path / "images", "w:") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    ways["images"] = (tmp_path / "images").read_bytes()
    for name, content in ways.items():
        with pytest.raises(UserError) as error:
            read_torch(put(tmp_path / f"{name}.pth", content))
        one_line(error, f"{name}.pth")


CONTENT = {"a.weight": torch.randn(4, 6), "b.bias": torch.arange(5)}
FORMATS = {
    "stacked": stacked_bytes({"state_dict": CONTENT, "more": [1, 2.5, "text", (None, True)]}),
    "tar": tar_bytes(CONTENT, {"epoch": 3}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_anywhere(tmp_path, name):
    right, generator = FORMATS[name], random.Random(0)
    end = right.rstrip(b"\0") if name == "tar" else right  # tars end with zeros that nobody needs
    for at in sorted({0, 1, 100, 520, len(end) - 1, *generator.sample(range(len(end)), 60)}):
        with pytest.raises(UserError) as error:
            read_torch(put(tmp_path / "a.pth", right[:at]))
        one_line(error, "a.pth")


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_anywhere(tmp_path, name):
    """These formats have no checksums: a flip in a number gives another one, and elsewhere it is
    read as something else or refused."""
    right, generator = FORMATS[name], random.Random(1)
    refused = 0
    for _ in range(300):
        changed = bytearray(right)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        try:
            found = read_torch(put(tmp_path / "a.pth", bytes(changed)))
            assert found is None or isinstance(found, dict | Record | list | tuple | int | str)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and "a.pth" in str(error)
    assert 20 < refused < 300
