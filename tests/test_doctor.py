"""`maskgit doctor --model FOLDER`: what it finds in a folder that is whole, and in others."""

import argparse
import hashlib
import json
import shutil

import pytest
import torch
from conftest import one_line
from safetensors.torch import load_file, save_file
from tiny_published import flax_bytes, official_tokenizer, official_transformer, taming_tokenizer

from maskgit import published_files
from maskgit.commands import doctor
from maskgit.common import UserError
from maskgit.common.folder import BUNDLED, file_hash
from maskgit.decode import decode
from maskgit.importing import import_files
from maskgit.model import MaskGIT
from maskgit.presets import PRESETS
from maskgit.published_files import OFFICIAL, File


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    (folder / "tokenizer").write_bytes(flax_bytes(official_tokenizer()))
    (folder / "transformer").write_bytes(flax_bytes(official_transformer(side=4)))
    files = [str(folder / name) for name in ("tokenizer", "transformer")]
    import_files(files, folder / "model", say=str)
    return folder / "model"


@pytest.fixture
def model(imported, tmp_path):
    return shutil.copytree(imported, tmp_path / "model")


@pytest.fixture
def examine(capsys):
    """`examine(folder)`: the exit status, what was found by its name, and the problems."""

    def run(folder):
        status = doctor.run(argparse.Namespace(model=str(folder)))
        lines = capsys.readouterr().out.splitlines()
        found = dict(line.removeprefix("PROBLEM: ").split(": ", 1) for line in lines)
        return status, found, [line for line in lines if line.startswith("PROBLEM")]

    return run


def test_a_folder_that_is_whole(model, examine):
    status, found, problems = examine(model)
    assert (status, problems) == (0, [])
    assert found["hashes"] == "7 files are as they were written"
    assert "official MaskGIT, from tokenizer, sha256" in found["source of vqgan"]
    assert "Apache-2.0" in found["source of transformer"]
    assert all("every tensor in its place" in found[part] for part in ("vqgan", "transformer"))
    assert found["tokenizer and transformer"] == "fit: images of 64 x 64"
    assert "trace.json" not in found


def test_the_bundled_model(examine):
    status, found, problems = examine(BUNDLED["emoji"])
    assert (status, problems) == (0, [])
    assert "no hashes to compare" in found["source.json"]
    assert {"vqgan", "transformer", "clip"} <= set(found)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_changed_and_a_missing_file(model, examine):
    flip(model / "vqgan" / "model.safetensors")
    (model / "presets.json").unlink()
    status, found, problems = examine(model)
    assert status == 1 and len(problems) == 2 and "hashes" not in found
    assert "was written" in found["vqgan/model.safetensors"]
    assert "missing" in found["presets.json"]


def test_a_structure_that_does_not_fit(model, examine):
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | {"depth": 3}))
    status, found, problems = examine(model)
    assert status == 1
    assert "missing" in found["transformer"] and "PROBLEM" in "".join(problems)
    (model / "transformer" / "model.safetensors").write_bytes(b"")
    assert "truncated" in examine(model)[1]["transformer"]


def test_a_tokenizer_of_another_family(model, examine, tmp_path):
    """With as many codes and pixels a token, which no shape tells."""
    torch.save(taming_tokenizer(), tmp_path / "last.ckpt")
    import_files([str(tmp_path / "last.ckpt")], tmp_path / "other", say=str)
    shutil.rmtree(model / "vqgan")
    shutil.copytree(tmp_path / "other" / "vqgan", model / "vqgan")
    source, other = (
        json.loads((folder / "source.json").read_text()) for folder in (model, tmp_path / "other")
    )
    source["parts"]["vqgan"] = other["parts"]["vqgan"]
    source["files"] |= other["files"]
    (model / "source.json").write_text(json.dumps(source))
    status, found, problems = examine(model)
    assert status == 1 and len(problems) == 1
    assert "do not belong together" in found["tokenizer and transformer"]


def recorded(model, labels=("goldfish", 5), seed=3, preset="maskgit"):
    """SHA-256 of the tokens, by `decode` alone."""
    net = MaskGIT.from_pretrained(model)
    ids = torch.tensor([1, 5])[: len(labels)]
    tokens = torch.full((len(ids), 16), 1024)
    settings = dict(PRESETS[preset])
    settings = {k: settings[k] for k in ("steps", "schedule", "temperature", "choice_temperature")}
    with torch.no_grad():
        seeds = [seed + i for i in range(len(ids))]
        done = decode(lambda tokens, r: net(tokens, ids), tokens, 1024, seeds=seeds, **settings)
    return hashlib.sha256(done.numpy().astype("<i8").tobytes()).hexdigest()


def write_trace(model, **changes):
    source = json.loads((model / "source.json").read_text())
    record = {
        "format_version": 1,
        "seed": 3,
        "labels": ["goldfish", 5],
        "preset": "maskgit",
        "sources": {kind: part["sha256"] for kind, part in source["parts"].items()},
        "tokens_sha256": recorded(model),
    }
    (model / "trace.json").write_text(json.dumps(record | changes))


def test_a_trace_of_tokens(model, examine):
    write_trace(model)
    status, found, _ = examine(model)
    assert status == 0, found
    assert found["trace.json"] == "seed 3 gives the 2 recorded grids"
    write_trace(model, preset=None)  # the model's own settings are the same here
    assert examine(model)[0] == 0
    write_trace(model, seed=4)
    status, found, problems = examine(model)
    assert status == 1 and len(problems) == 1
    assert f"not {recorded(model)}" in found["trace.json"]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format_version": 2}, "format_version"),
        ({"seed": "3"}, "seed"),
        ({"seed": True}, "seed"),
        ({"labels": [{}]}, "labels"),
        ({"labels": [[1]]}, "labels"),
        ({"labels": [1.5]}, "labels"),
        ({"labels": [True]}, "labels"),
        ({"preset": [1]}, "preset"),
        ({"preset": {}}, "preset"),
        ({"labels": "goldfish"}, "labels"),
        ({"labels": ["goldfsh"]}, "goldfish"),
        ({"labels": []}, "at least 1"),
        ({"labels": [None]}, "needs a class"),
        ({"preset": "halton"}, "preset"),
        ({"tokens_sha256": None}, "tokens_sha256"),
        ({"sources": 5}, "sources"),
        ({"sources": {"vqgan": "abc"}}, "another vqgan"),
    ],
)
def test_traces_that_are_none(model, examine, changes, part):
    write_trace(model, **changes)
    status, found, problems = examine(model)
    assert status == 1 and len(problems) == 1
    assert part in found["trace.json"]


def test_what_is_no_model_and_no_record(model, examine, tmp_path):
    (tmp_path / "nothing").mkdir()
    status, found, _ = examine(tmp_path / "nothing")
    assert status == 1 and "none of vqgan, transformer, clip" in found["parts"]
    for content in ("[]", "{", '{"format_version": 1}', '{"format_version": 1, "parts": {"a": 1}}'):
        (model / "source.json").write_text(content)
        status, found, problems = examine(model)
        assert status == 1 and len(problems) == 1 and "source.json" in problems[0]


SOURCES = {  # what is changed in source.json, and what is said
    "files": ({}, "no hash of it"),
    "parts": ({}, "in the folder and not in the source.json"),
    "parts/vqgan/family": (3, "does not say of each part"),
    "parts/vqgan/file": (3, "does not say of each part"),
    "parts/other": ({}, "other parts than"),
    "files/labels.json": (3, "names in this folder"),
    "files//etc/passwd": ("x", "names in this folder"),
    "files/a/../../b": ("x", "names in this folder"),
    "files/a\0b": ("x", "names in this folder"),
    "files/vqgan/none": ("x", "missing from"),
}


@pytest.mark.parametrize("where", SOURCES)
def test_sources_that_are_none(model, examine, where):
    value, told = SOURCES[where]
    top, _, rest = where.partition("/")
    content = json.loads((model / "source.json").read_text())
    if not rest:
        content[top] = value
    elif rest.startswith("vqgan/f"):
        content[top]["vqgan"][rest.removeprefix("vqgan/")] = value
    else:
        content[top][rest] = value
    (model / "source.json").write_text(json.dumps(content))
    status, _, problems = examine(model)
    assert status == 1 and told in problems[0]
    assert "root:" not in "".join(problems)


def test_a_file_that_nobody_wrote(model, examine):
    for name in ("transformer/extra.safetensors", "more.json"):
        (model / name).write_bytes(b"{}")
        status, found, problems = examine(model)
        assert status == 1 and len(problems) == 1 and "no hash of it" in found[name]
        (model / name).unlink()
    (model / "README.md").write_text("mine")  # which no model is read from
    assert examine(model)[0] == 0


def test_numbers_that_are_not_finite(model, examine):
    file = model / "transformer" / "model.safetensors"
    tensors = load_file(file)
    tensors["net.head_bias"][2] = torch.nan
    save_file(tensors, file)
    source = json.loads((model / "source.json").read_text())
    source["files"]["transformer/model.safetensors"] = file_hash(file)
    (model / "source.json").write_text(json.dumps(source))
    status, found, problems = examine(model)
    assert status == 1 and len(problems) == 1
    assert "1 tensors hold numbers that are not finite (net.head_bias)" in found["transformer"]


def test_a_folder_in_place_of_a_file(model, examine):
    (model / "trace.json").mkdir()
    status, found, problems = examine(model)
    assert status == 1 and len(problems) == 1 and "cannot be read" in found["trace.json"]


def test_a_part_alone_and_names_without_end(model, examine):
    with pytest.raises(UserError) as error:
        examine(model / "vqgan")
    one_line(error, "give the folder above")
    file = model / "vqgan" / "model.safetensors"
    save_file(load_file(file) | {"x" * 100_000: torch.ones(1)}, file)
    assert max(len(line) for line in examine(model)[2]) < 1100


def test_a_published_file_is_known_by_its_hash(model, examine, monkeypatch):
    sha256 = json.loads((model / "source.json").read_text())["parts"]["vqgan"]["sha256"]
    listed = {
        "known": File("known", "", OFFICIAL, sha256=sha256),
        "transformer": File("transformer", "", OFFICIAL, sha256="0" * 64),
    }
    assert "no SHA-256 of a published file" in examine(model)[1]["source of vqgan"]
    monkeypatch.setattr(published_files, "FILES", listed)
    status, found, _ = examine(model)
    assert "the published file known, by its SHA-256" in found["source of vqgan"]
    assert "warning: not the file that was published" in found["source of transformer"]
    assert status == 0


def test_the_command(forked, imported, tmp_path):
    done = forked("doctor", "--model", imported)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokenizer and transformer: fit" in done.stdout
    done = forked("doctor", "--model", tmp_path / "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
