"""Files that would run code, in any of the formats of torch."""

import argparse
import datetime
import io
import os
import pickle
import subprocess
import sys
import tarfile
import types
from collections import Counter, OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from conftest import one_line
from omegaconf import OmegaConf
from test_pickles import Tensor, archive, pickled

from maskgit.common import UserError
from maskgit.common.pickles import Record, flatten, read_torch


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
        **{"array": numpy.arange(3), "when": datetime.datetime.now(), "layout": torch.strided},
        **{"phase": 1 + 2j, "bytes": bytearray(b"ab"), "took": datetime.timedelta(1)},
        "complex": torch.ones(2, dtype=torch.complex64),
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
        assert torch.equal(found["complex"], content["complex"])
        for name in ("config", "counts", "names", "array", "when", "layout", "phase", "took"):
            assert isinstance(found[name], Record)


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


def test_items_are_given_to_nothing_but_dicts(tmp_path):
    tensor = b"\x80\x02" + pickled(Tensor())[2:-1]
    for instructions in (tensor + b"K\x00K\x01s.", tensor + b"(K\x00K\x01u."):
        with pytest.raises(UserError) as error:
            read_torch(archive(tmp_path / "a.pt", instructions, [bytes(16)]))
        one_line(error, "a.pt", "no dict")


def test_attributes_are_given_to_nothing_but_records(tmp_path):
    """BUILD on a function or a class would change them for whatever is read next."""
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"):
        built = b"\x80\x02" + target + b"}S'mark'\nI1\nsb."
        found = read_torch(archive(tmp_path / "a.pt", built))
        assert not hasattr(found, "mark")
