"""`maskgit import`: what a file is, what is written, what is refused, and what it takes."""

import json
import os
import resource
import signal

import pytest
import torch
from conftest import ROOT, one_line
from runs import run
from safetensors.torch import save
from tiny_clip import tiny_clip
from tiny_published import (
    flax_bytes,
    halton_transformer,
    llamagen_tokenizer,
    official_tokenizer,
    official_transformer,
    put,
    stacked_bytes,
    taming_tokenizer,
    tar_bytes,
)

from clip import CLIP
from clip.recipes import Recipe, recipes
from maskgit import MaskGIT, Pipeline
from maskgit.common import UserError
from maskgit.common.folder import file_hash
from maskgit.importing import check_together, imagenet, import_files, recognise
from maskgit.resize import class_names
from vqgan import VQGAN


def silent(line):
    """What an import says, where a test does not ask."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One small file of each published kind, by its usual name."""
    folder = tmp_path_factory.mktemp("published")
    halton = {f"_orig_mod.{name}": tensor for name, tensor in halton_transformer().items()}
    contents = {
        "tokenizer_imagenet256_checkpoint": flax_bytes(official_tokenizer()),
        "maskgit_imagenet256_checkpoint": flax_bytes(official_transformer(side=16)),
        "maskgit_imagenet512_checkpoint": flax_bytes(official_transformer(side=32)),
        "vq_ds16_c2i.pt": {"model": llamagen_tokenizer(), "steps": 1, "optimizer": {"state": {}}},
        "vq_ds8_c2i.pt": {"model": llamagen_tokenizer("llamagen_vq8.txt")},
        "halton.pth": {"iter": 1, "model_state_dict": halton, "optimizer_state_dict": {}},
        "last.ckpt": {"state_dict": taming_tokenizer(), "epoch": 3},
    }
    return {name: put(folder / name, content) for name, content in contents.items()}


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


# ---------------------------------------------------------------- folders


def test_official_maskgit(files, tmp_path):
    names = ("tokenizer_imagenet256_checkpoint", "maskgit_imagenet256_checkpoint")
    said, dest = [], tmp_path / "deep" / "maskgit256"
    import_files([files[name] for name in reversed(names)], dest, say=said.append)
    assert "official MaskGIT transformer: 16 x 16 tokens, 1,000 classes" in said[0]
    assert "official MaskGIT tokenizer: 1,024 codes, 16 pixels a token" in said[1]
    assert sum("Apache-2.0" in line for line in said) == 2
    assert f"maskgit sample --model {dest}" in said
    parts = [f"{kind}/{file}" for kind in ("transformer", "vqgan") for file in MODEL]
    assert written(dest) == sorted([*INDEX, *parts])
    assert [path.name for path in dest.parent.iterdir()] == ["maskgit256"]

    pipe = Pipeline.from_pretrained(dest, "cpu", "fp32")
    assert pipe.image_size == (256, 256)
    assert (len(pipe.labels), pipe.labels[0], pipe.labels[999]) == (1000, "tench", "toilet tissue")
    assert pipe.presets["maskgit"]["settings"]["choice_temperature"] == 4.5
    assert pipe.settings({}) == pipe.settings({"preset": "maskgit"})
    assert pipe.sample(["goldfish"], steps=2).shape == (1, 3, 256, 256)
    for name, part in zip(names, (pipe.vqgan, pipe.transformer), strict=True):
        own = recognise(files[name]).model.state_dict()
        assert all(torch.equal(own[key], value) for key, value in part.state_dict().items())

    source = json.loads((dest / "source.json").read_text())
    for kind, name in zip(("vqgan", "transformer"), names, strict=True):
        about = source["parts"][kind]
        assert (about["family"], about["file"]) == ("official MaskGIT", name)
        assert about["sha256"] == file_hash(recognise(files[name]).path)
        assert about["licence"].startswith("Apache-2.0")
    assert sorted(source["files"]) == sorted({*INDEX, *parts} - {"source.json"})
    assert all(file_hash(dest / name) == sha for name, sha in source["files"].items())


MODEL = ("config.json", "model.safetensors")
INDEX = ("labels.json", "model_index.json", "presets.json", "source.json")


def test_halton_maskgit(files, tmp_path):
    both = [files["vq_ds16_c2i.pt"], files["halton.pth"]]
    with pytest.raises(UserError) as error:
        import_files(both, tmp_path / "halton", say=silent)
    one_line(error, "no published size", "heads")
    assert not list(tmp_path.iterdir())
    import_files(both, tmp_path / "halton", heads=2, say=silent)
    pipe = Pipeline.from_pretrained(tmp_path / "halton", "cpu", "fp32")
    assert pipe.transformer.config.heads == 2 and pipe.settings({})["order"] == "halton"
    assert pipe.sample([0], steps=2, seed=1).shape == (1, 3, 64, 64)
    assert json.loads((tmp_path / "halton/source.json").read_text())["parts"]["vqgan"] == {
        "family": "LlamaGen",
        "file": "vq_ds16_c2i.pt",
        "sha256": file_hash(tmp_path.__class__(both[0])),
        "licence": "MIT (FoundationVision/LlamaGen)",
        "ballast": ["quantize.codebook_used"],
    }


@pytest.mark.parametrize("wrap", ["zip", "stacked", "tar", "safetensors"])
def test_a_tokenizer_alone(tmp_path, wrap):
    tensors = taming_tokenizer()
    wraps = {"stacked": stacked_bytes, "tar": tar_bytes, "safetensors": save}
    file = put(tmp_path / "last.ckpt", wraps.get(wrap, dict)(tensors))
    (tmp_path / "dest").mkdir()  # an empty folder is as good as none
    import_files([file], tmp_path / "dest", say=silent)
    assert written(tmp_path / "dest") == ["source.json", *(f"vqgan/{name}" for name in MODEL)]
    model = VQGAN.from_pretrained(tmp_path / "dest")
    assert torch.equal(model.quantizer.codebook, tensors["quantize.embedding.weight"])


def test_a_transformer_alone(files, tmp_path):
    said = []
    import_files([files["maskgit_imagenet512_checkpoint"]], tmp_path / "a", say=said.append)
    assert MaskGIT.from_pretrained(tmp_path / "a").config.grid == [32, 32]
    assert "needs its tokenizer" in said[-1]
    assert class_names(str(tmp_path / "a"), 1000)[1] == "goldfish"  # for what is trained from it


def test_a_clip_beside_them(files, tmp_path, monkeypatch):
    model = tiny_clip()
    model.config.recipe = "small/test"
    monkeypatch.setitem(recipes(), "small/test", Recipe(model.config, file="other.pt"))
    file = put(tmp_path / "clip.pt", model.state_dict())
    with pytest.raises(UserError) as error:
        import_files([file], tmp_path / "dest", say=silent)
    one_line(error, "@NAME", "small/test")
    said = []
    import_files([f"{file}@small/test", files["last.ckpt"]], tmp_path / "dest", say=said.append)
    assert "clip.pt: small/test CLIP: images of 16 x 16" in said[0]
    assert "licence of clip/: not known here: see who published it" in said
    assert {name.split("/")[0] for name in written(tmp_path / "dest")} == {
        *("clip", "source.json", "vqgan")
    }
    found = CLIP.from_pretrained(tmp_path / "dest").state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("tokenizer", "transformer", "part"),
    [
        ("vq_ds16_c2i.pt", "maskgit_imagenet256_checkpoint", "16,384 and 1,024 codes"),
        ("last.ckpt", "maskgit_imagenet256_checkpoint", "trained on the tokens of official"),
        ("vq_ds8_c2i.pt", "halton.pth", "16 pixels a token"),
        ("tokenizer_imagenet256_checkpoint", "halton.pth", "1,024 and 16,384 codes"),
        ("tokenizer_imagenet256_checkpoint", "maskgit_imagenet512_checkpoint", "images of 256"),
    ],
)
def test_those_that_do_not_belong_together(files, tokenizer, transformer, part):
    heads = 2 if transformer == "halton.pth" else None
    found = [recognise(files[tokenizer]), recognise(files[transformer], heads)]
    with pytest.raises(UserError) as error:
        check_together({part.kind: part for part in found})
    one_line(error, tokenizer, transformer, "do not belong together", part)


def test_two_of_a_kind(files, tmp_path):
    with pytest.raises(UserError) as error:
        import_files([files["last.ckpt"], files["vq_ds8_c2i.pt"]], tmp_path / "a", say=silent)
    one_line(error, "last.ckpt", "vq_ds8_c2i.pt", "both for vqgan/")
    with pytest.raises(UserError) as error:
        import_files([files["last.ckpt"]], tmp_path / "a", heads=3, say=silent)
    one_line(error, "heads")
    assert not (tmp_path / "a").exists()


def test_a_folder_with_something_in_it_is_left_alone(files, tmp_path):
    put(tmp_path / "notes.txt", b"mine")
    for dest, part in ((tmp_path, "something"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(UserError) as error:
            import_files([files["last.ckpt"]], dest, say=silent)
        one_line(error, dest, part)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_matches_no_kind(tmp_path):
    file = put(tmp_path / "a.pt", {"layer.weight": torch.ones(2)})
    with pytest.raises(UserError) as error:
        recognise(file)
    one_line(error, "a.pt", "matches no tokenizer, transformer or CLIP", "layer.weight")
    with pytest.raises(UserError) as error:
        recognise(str(tmp_path))
    one_line(error, "is a folder")


def test_missing_and_left_over_tensors(files, tmp_path):
    whole = llamagen_tokenizer()
    less = {name: tensor for name, tensor in whole.items() if name != "quant_conv.bias"}
    for content, name in ((less, "quant_conv.bias"), (whole | {"x.y": torch.ones(1)}, "x.y")):
        with pytest.raises(UserError) as error:
            recognise(put(tmp_path / "a.pt", {"model": content}))
        one_line(error, name)


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_file_that_would_execute_code(forked, tmp_path):
    torch.save({"model": taming_tokenizer(), "args": Runs()}, tmp_path / "a.pt")
    done = forked("import", "a.pt", "dest")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("maskgit: a.pt is refused: it names")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def small_files():
    """Hook: no file can be larger than 100 KB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_nothing_half_written(files, tmp_path):
    """Where the disk has no room, and after an import that was killed."""
    (tmp_path / ".partial-dest" / "vqgan").mkdir(parents=True)
    words = ["import", files["last.ckpt"], tmp_path / "dest"]
    status, _, err = run(ROOT, words, small_files)
    assert status == 1 and "File too large" in err
    assert err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
    import_files([files["last.ckpt"]], tmp_path / "dest", say=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


def test_the_command(forked, files, tmp_path):
    done = forked("import", "--heads", "2", files["vq_ds16_c2i.pt"], files["halton.pth"], "h")
    assert done.returncode == 0, done.stderr
    assert "Halton-MaskGIT transformer" in done.stdout and done.stderr == ""
    done = forked("sample", "--model", "h", "--class", "tench", "--steps", "2", "--out", "a.png")
    assert done.returncode == 0, done.stderr
    done = forked("import", files["last.ckpt"])
    assert done.returncode == 2 and "DEST" in done.stderr


def test_the_names_of_imagenet():
    names = imagenet()
    assert len(set(names)) == 1000
    assert [names[i] for i in (1, 282, 404)] == ["goldfish", "tiger cat", "airliner"]
