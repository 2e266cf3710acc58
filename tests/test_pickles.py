"""Files of torch.save and TorchScript: read exactly, and nothing in them runs."""

import io
import pickle
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT

from maskgit.common.pickles import Record, flatten, read_torch


def archive(path, pickled, storages=(), byteorder=b"little", method=zipfile.ZIP_STORED):
    """A file as torch.save makes it, with any pickle in it."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("toy/data.pkl", pickled)
        if byteorder is not None:
            file.writestr("toy/byteorder", byteorder)
        for i, content in enumerate(storages):
            file.writestr(f"toy/data/{i}", content)
    return path


class Tensor:
    """Pickled as a tensor of 4 bytes a number, of this storage, with any numbers around it."""

    def __init__(self, key="0", count=4, offset=0, size=(4,), stride=(1,)):
        self.id = ("storage", torch.FloatStorage, key, "cpu", count)
        self.layout = (offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Id(self.id), *self.layout)


class Made(Tensor):
    """The same of anything in a storage's place."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Id:
    def __init__(self, content):
        self.content = content


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.content if isinstance(value, Id) else None


def pickled(value):
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def test_equal_to_torch_load(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    kinds = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    content = {
        "state_dict": OrderedDict(
            **{kind: torch.arange(5).to(getattr(torch, kind)) for kind in kinds},
            **{"rows": base, "turned": base.T, "part": base[1:3, 2:4], "scalar": torch.tensor(2.5)},
            **{"none": torch.empty(0, 3), "weight": torch.nn.Parameter(base)},
        ),
        **{"epoch": 3, "name": "ä", "rate": 0.1, "more": [1, (2, None, True)]},
        **{"size": torch.Size([2, 3]), "dtype": torch.float16},
    }
    torch.save(content, tmp_path / "a.pt")
    found = read_torch(tmp_path / "a.pt")
    expected = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(found) == list(content)
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor), name
        assert found["state_dict"][name].dtype == tensor.dtype
        assert found["state_dict"][name].stride() == tensor.stride()
    for name in ("epoch", "name", "rate", "more", "size", "dtype"):
        assert found[name] == content[name]
    assert flatten(found).keys() == {f"state_dict.{name}" for name in content["state_dict"]}


def test_writing_to_a_tensor_leaves_the_file(tmp_path):
    torch.save({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    read_torch(tmp_path / "a.pt")["a"].fill_(1)
    assert (tmp_path / "a.pt").read_bytes() == before


def test_classes_of_a_torchscript_archive_are_records(tmp_path, monkeypatch):
    """Written by torch.save from classes that say they are TorchScript's: the same instructions."""
    module = types.ModuleType("__torch__.clip.model")
    module.Tower = type("Tower", (), {"__module__": module.__name__})
    for name in ("__torch__", "__torch__.clip", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    outer, inner = module.Tower(), module.Tower()
    inner.weight, inner.training = torch.arange(3.0), False
    outer.visual, outer.logit_scale = inner, torch.tensor(2.0)
    torch.save(outer, tmp_path / "a.pt")
    found = read_torch(tmp_path / "a.pt")
    assert isinstance(found, Record) and found["visual"]["training"] is False
    assert list(flatten(found)) == ["visual.weight", "logit_scale"]
    assert torch.equal(found["visual"]["weight"], torch.arange(3.0))


@pytest.mark.parametrize("make", ["script", "trace"])
def test_torchscript(tmp_path, make):
    if not hasattr(torch.jit, make):
        pytest.skip(f"this torch has no torch.jit.{make}")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).half().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = (torch.zeros(1, 3, 4, 4).half(),) if make == "trace" else ()
        getattr(torch.jit, make)(model, *example).save(tmp_path / "a.pt")
    found = read_torch(tmp_path / "a.pt")
    assert isinstance(found, Record)
    assert flatten(found).keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(flatten(found)[name], tensor)


def test_nothing_is_imported_for_a_record(tmp_path):
    wanted = b"\x80\x02cpytorch_lightning.antigravity\nTrainer\n(S'touch ran'\ntR."
    assert read_torch(archive(tmp_path / "a.pt", wanted)) == {}
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def test_no_torch_before_a_file_is_read():
    code = "import sys, maskgit.common.pickles; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
