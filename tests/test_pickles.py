"""Files of torch.save and TorchScript: read exactly, and nothing in them runs."""

import argparse
import copy
import io
import os
import pickle
import random
import subprocess
import sys
import tarfile
import types
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT, one_line
from omegaconf import OmegaConf

from maskgit.common import UserError
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


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch ran",), f"{os.system.__module__}.system"),
        (eval, ("open('ran', 'w')",), "eval"),
        (exec, ("open('ran', 'w')",), "exec"),
        (getattr, (1, "real"), "builtins.getattr"),
        (subprocess.Popen, (["touch", "ran"],), "subprocess.Popen"),
        (torch.load, ("ran",), "torch.serialization.load"),
        (torch.hub.load, ("ran", "ran"), "torch.hub.load"),
        (torch.set_num_threads, (1,), "torch"),
        (OrderedDict.fromkeys, ("ran",), "builtins.getattr"),
    ],
)
def test_a_file_that_would_execute_code_is_refused(
    tmp_path, monkeypatch, function, arguments, name
):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Calls(function, *arguments)}, "a.pt")
    with pytest.raises(UserError) as error:
        read_torch("a.pt")
    one_line(error, "a.pt", name, "refused")
    assert not (tmp_path / "ran").exists()


FORBIDDEN = ("os.", "subprocess.", "pickle.find_class", "shutil.", "pty.")
happened = []  # audit events: Python tells them of what it is about to do
sys.addaudithook(lambda event, _: event.startswith(FORBIDDEN) and happened.append(event))


def wrapped(path, kind, instructions):
    """A file of each format with these instructions where a pickle is."""
    stacked = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001)]
    stacked += [pickle.dumps({"little_endian": True}, 2), instructions, pickle.dumps([], 2)]
    if kind == "zip":
        archive(path, instructions)
    elif kind == "tar":
        with tarfile.open(path, "w:") as tar:
            for name in ("storages", "tensors", "pickle"):
                empty = pickle.dumps(0, 2) + pickle.dumps([], 2)
                content = instructions if name == "pickle" else empty
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        path.write_bytes(b"".join(stacked) if kind == "stacked" else instructions)
    return path


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()  # SHORT_BINUNICODE


CODE = {
    "GLOBAL": b"\x80\x02cos\nsystem\n(S'touch ran'\ntR.",
    "STACK_GLOBAL": b"\x80\x04" + short("os") + short("system") + b"\x93S'touch ran'\n\x85R.",
    "INST": b"\x80\x02(S'touch ran'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nS'touch ran'\no.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(S'touch'\ntb\x81.",
    "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\nS'touch'\n\x85}\x92.",
    "eval": b'\x80\x02c__builtin__\neval\n(S\'open("ran", "w")\'\ntR.',
    "builtins": b'\x80\x04cbuiltins\neval\n(S\'open("ran", "w")\'\ntR.',
    "BUILD": b"\x80\x02cargparse\nNamespace\n)\x81}S'__setstate__'\ncos\nsystem\nsb.",
    "nested": b"\x80\x02}S'a'\n](cargparse\nNamespace\n(cos\nsystem\n(S'touch ran'\ntRtRes.",
    "copyreg": b"\x80\x02ccopy_reg\n_reconstructor\n(cargparse\nNamespace\nNNtR.",
    "a storage": b"\x80\x02(S'storage'\ncos\nsystem\n(S'touch ran'\ntRS'0'\nS'cpu'\nK\x01tQ.",
    "torch": b"\x80\x02ctorch.storage\n_load_from_bytes\n(S'ran'\ntR.",
    "numpy": b"\x80\x02cnumpy\nload\n(S'ran'\ntR.",
    "codecs": b"\x80\x02c_codecs\nopen\n(S'ran'\nS'w'\ntR.",
    # Names like those of Lightning, argparse and OmegaConf that are not their classes'.
    "function": b"\x80\x02cpytorch_lightning.utilities\nsystem\n(S'touch ran'\ntR.",
    "dotted": b"\x80\x04" + short("pytorch_lightning") + short("Trainer.os.system") + b"\x93.",
    "alike": b"\x80\x02cpytorch_lightning_evil\nTrainer\n(S'touch ran'\ntR.",
    "prefix": b"\x80\x02clightningos\nTrainer\n(S'touch ran'\ntR.",
    "path": b"\x80\x02cpytorch_lightning/../os\nSystem\n(S'touch ran'\ntR.",
    "argparse": b"\x80\x02cargparse\n_sys\n.",
    "Namespace": b"\x80\x04" + short("argparse") + short("Namespace.__init__") + b"\x93.",
    "line": b"\x80\x04" + short("os\nx") + short("\x1b[31msystem") + b"\x93.",
}


@pytest.mark.parametrize("kind", ["zip", "stacked", "tar", "bare"])
@pytest.mark.parametrize("name", CODE)
def test_code_in_any_format(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    path = wrapped(tmp_path / "a.pt", kind, CODE[name])
    happened.clear()
    with pytest.raises(UserError) as error:
        read_torch(path)
    assert happened == []
    one_line(error, "a.pt", "is refused: it names", "nothing of it has run")
    assert str(error.value).isprintable()
    assert not (tmp_path / "ran").exists()


def test_what_lightning_and_argparse_leave_is_inert(tmp_path, monkeypatch):
    """Written by torch.save from classes in modules of their names, and of OmegaConf's own."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.utilities")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    made = {"__module__": names[1]}
    modules[names[1]].ModelCheckpoint = type("ModelCheckpoint", (), made)
    made = {"__module__": names[2]}
    modules[names[2]].AttributeDict = type("AttributeDict", (dict,), made)
    checkpoint = modules[names[1]].ModelCheckpoint()
    checkpoint.best, checkpoint.weight = 0.5, torch.ones(3)
    content = {
        "state_dict": OrderedDict(weight=torch.arange(3.0)),
        "callbacks": {modules[names[1]].ModelCheckpoint: {"best": numpy.float64(0.5)}},
        "object": checkpoint,
        "hyper_parameters": modules[names[2]].AttributeDict(rate=0.1),
        "args": argparse.Namespace(lr=1e-4, path=Path("x"), device=torch.device("cpu")),
        "config": OmegaConf.create({"a": {"b": [1, 2]}, "c": "${a.b}"}),
        "counts": Counter("aab"),
        "names": {"a", "b"},
    }
    for new in (True, False):
        torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
        happened.clear()
        found = read_torch(tmp_path / "a.ckpt")
        assert happened == []
        assert found["state_dict"]["weight"].tolist() == [0, 1, 2]
        assert isinstance(found["args"], Record) and found["args"]["lr"] == 1e-4
        assert found["hyper_parameters"] == {"rate": 0.1}
        assert found["object"]["best"] == 0.5
        assert list(flatten({"state_dict": found["state_dict"]})) == ["state_dict.weight"]
        for name in ("config", "counts", "names"):
            assert isinstance(found[name], Record)


def test_nothing_is_imported_for_a_record(tmp_path):
    wanted = b"\x80\x02cpytorch_lightning.antigravity\nTrainer\n(S'touch ran'\ntR."
    assert read_torch(archive(tmp_path / "a.pt", wanted)) == {}
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def test_little_that_stands_for_much(tmp_path):
    """A few bytes that describe a tuple of 2^200 parts, or a dict of 2^60 names."""
    tuples = b"\x80\x02}N\x85" + b"2\x86" * 200 + b"Ns."
    with pytest.raises(UserError) as error:
        read_torch(archive(tmp_path / "a.pt", tuples))
    one_line(error, "a.pt", "nested tuples")
    content = {"a": torch.zeros(1)}
    for _ in range(40):
        content = {"a": content, "b": content}
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(UserError) as error:
        flatten(read_torch(tmp_path / "b.pt"))
    one_line(error, "nested too deep")
    key = b"\x80\x02(S'storage'\nctorch\nFloatStorage\nN\x85" + b"2\x86" * 200
    with pytest.raises(UserError) as error:
        read_torch(archive(tmp_path / "a.pt", key + b"S'cpu'\nK\x01tQ."))
    one_line(error, "a.pt", "no storage")


def test_records_that_overlap(tmp_path):
    """Many names of one large record would be read once each."""
    path = archive(tmp_path / "a.pt", pickled(1), [bytes(1000)])
    with zipfile.ZipFile(path, "a") as file:
        record = file.getinfo("toy/data/0")
        for i in range(1, 20):
            again = copy.copy(record)
            again.filename = again.orig_filename = f"toy/data/{i}"
            file.filelist.append(again)
        file._didModify = True
    with pytest.raises(UserError) as error:
        read_torch(path)
    one_line(error, "a.pt", "overlap")


@pytest.mark.parametrize(
    "instructions",
    [
        b"(S'touch ran'\nios\nsystem\n.",  # INST
        b"\x80\x02(cos\nsystem\nS'touch ran'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x05torch\x8c\x0ehub.os.system"[:-1] + b"m\x93)R.",  # a dotted name
        b"\x80\x02ctorch\nnn\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}S'__code__'\ncos\nsystem\nsb.",
    ],
)
def test_by_any_instruction(tmp_path, monkeypatch, instructions):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read_torch(archive(tmp_path / "a.pt", instructions))
    one_line(error, "a.pt")
    assert not (tmp_path / "ran").exists()


def test_attributes_are_given_to_nothing_but_records(tmp_path):
    """BUILD on a function or a class would change them for whatever is read next."""
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"):
        built = b"\x80\x02" + target + b"}S'mark'\nI1\nsb."
        found = read_torch(archive(tmp_path / "a.pt", built))
        assert not hasattr(found, "mark")


def test_tensors_lie_inside_their_storages(tmp_path):
    numbers = torch.arange(4.0).numpy().tobytes()
    good = pickled(Tensor(offset=1, size=(2, 2), stride=(1, 1)))
    found = read_torch(archive(tmp_path / "good.pt", good, [numbers]))
    assert found.tolist() == [[1, 2], [2, 3]]
    for bad in (
        Tensor(count=5, size=(5,)),  # beyond the record
        Tensor(count=-1),
        Tensor(count=2),  # beyond the storage
        Tensor(offset=1),
        Tensor(offset=-1, size=(2,)),
        Tensor(size=(2, 2), stride=(3, 1)),
        Tensor(offset=3, size=(2,), stride=(-1,)),
        Tensor(size=(1 << 40,), stride=(0,)),  # little in the file, and all memory when copied
        Tensor(size=(-1, -1), stride=(1, 1)),
        Tensor(size=(2, 2), stride=(1,)),
        Tensor(size="ab", stride=(1, 1)),
    ):
        path = archive(tmp_path / "bad.pt", pickled(bad), [numbers])
        with pytest.raises(UserError) as error:
            read_torch(path)
        one_line(error, "bad.pt")
    with pytest.raises(UserError) as error:
        read_torch(archive(tmp_path / "bad.pt", pickled(Tensor(key="7")), [numbers]))
    one_line(error, "record data/7 is missing")


def test_numbers_that_no_alignment_holds(tmp_path):
    """Zip files of other writers put records anywhere."""
    for shift in range(8):
        path = tmp_path / f"{'a' * (shift + 1)}.pt"
        numbers = torch.arange(4.0).numpy().tobytes()
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"{'r' * (shift + 1)}/data.pkl", pickled(Tensor()))
            file.writestr(f"{'r' * (shift + 1)}/data/0", numbers)
        assert read_torch(path).tolist() == [0, 1, 2, 3]


def test_damaged_and_foreign_files(tmp_path):
    torch.save({"a": torch.randn(1000)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    middle = good.index(b"data/0") + 300
    numbers = torch.arange(4.0).numpy().tobytes()
    archive(tmp_path / "big", pickled(Tensor()), [numbers], byteorder=b"big")
    archive(tmp_path / "packed", pickled(Tensor()), [numbers * 9], method=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "other", "w") as file:
        file.writestr("array.npy", "")
    cases = {
        "empty": (b"", "empty, truncated"),
        "text": (b"not a model\n" * 9, "no file of torch.save"),
        "cut": (good[: len(good) // 2], "truncated"),
        "flipped": (good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "is damaged"),
        "pickle": (pickle.dumps({"a": 1}), "is a pickle"),
        "big": (None, "big-endian"),
        "packed": (None, "compressed"),
        "other": (None, "0 records data.pkl"),
        # These take memory by a number in the file: 2^40 bytes, and an index of 2^31.
        "bytes": (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "is damaged"),
        "memo": (b"\x80\x02Nr\xff\xff\xff\x7f\x85h\x00.", "is damaged"),
        "stop": (b"\x80\x02N", "is damaged"),
    }
    for name, (content, part) in cases.items():
        if name in ("bytes", "memo", "stop"):
            archive(tmp_path / name, content)
        elif content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            read_torch(tmp_path / name)
        one_line(error, name, part)
    with pytest.raises(UserError) as error:
        read_torch(tmp_path / "nowhere.pt")
    one_line(error, "nowhere.pt")


def test_files_without_checksums(tmp_path):
    """torch.save can leave them out, and writes 0."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_torch(tmp_path / "a.pt")["a"].tolist() == [0, 1, 2]


def test_any_change_of_a_pickle_is_read_or_refused(tmp_path):
    generator = random.Random(0)
    square = Tensor(size=(2, 2), stride=(2, 1))
    content = {"a": Tensor(), "b": [1, 2.5, "text", (None, True)], "c": square}
    right, numbers = pickled(content), torch.arange(4.0).numpy().tobytes()
    refused = 0
    for _ in range(400):
        changed = bytearray(right)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        try:
            read_torch(archive(tmp_path / "a.pt", bytes(changed), [numbers]))
        except UserError:
            refused += 1
    assert 100 < refused < 400


def test_dicts_in_themselves(tmp_path):
    content = {}
    content["again"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError) as error:
        flatten(read_torch(tmp_path / "a.pt"))
    one_line(error, "nested too deep")


def test_no_torch_before_a_file_is_read():
    code = "import sys, maskgit.common.pickles; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
