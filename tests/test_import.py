"""`maskgit import`: what a file is, what is written, what is refused, and what it takes."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, one_line
from safetensors.torch import save
from tiny_clip import tiny_clip
from tiny_published import (
    draw,
    flax_bytes,
    halton_transformer,
    listed,
    llamagen_tokenizer,
    narrow,
    official_tokenizer,
    official_transformer,
    stacked_bytes,
    taming_tokenizer,
    tar_bytes,
)

from clip import CLIP
from clip.recipes import Recipe, recipes
from maskgit import MaskGIT, Pipeline
from maskgit.common import UserError
from maskgit.common.folder import file_hash, write_tensors
from maskgit.common.published import file_format, read_tensors
from maskgit.importing import check_together, imagenet, import_files, recognise
from vqgan import VQGAN


def silent(line):
    """What an import says, where a test does not ask."""


def put(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return str(path)


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


# ---------------------------------------------------------------- formats


TENSORS = {"a.weight": torch.randn(4, 6), "b.bias": torch.arange(5)}
FORMATS = {
    "safetensors": save(TENSORS),
    "stacked": stacked_bytes({"state_dict": TENSORS}),
    "tar": tar_bytes(TENSORS),
    "flax": flax_bytes(TENSORS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_by_its_content(tmp_path, name):
    path = tmp_path / "model.bin"
    put(path, FORMATS[name])
    assert file_format(path) == {"stacked": "torch", "tar": "torch"}.get(name, name)
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())


def other(value):
    return {name: torch.full_like(tensor, value) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"ema": TENSORS, "model": other(1), "state_dict": other(2)},
        {"model": TENSORS, "state_dict": other(2), "optimizer": {"state": {0: other(3)}}},
        {"ema": 0.999, "state_dict": TENSORS, "model_state_dict": other(2)},
        {"ema": {}, "model_state_dict": TENSORS, "args": {"model": "small"}},
        {"state_dict": {"model": {f"module._orig_mod.{k}": v for k, v in TENSORS.items()}}},
        {f"_orig_mod.module.{name}": tensor for name, tensor in TENSORS.items()},
    ],
)
def test_weights_in_a_training_checkpoint(tmp_path, content):
    found = read_tensors(put(tmp_path / "a.pt", content))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())


def test_files_that_hold_no_weights(tmp_path):
    cases = [
        (b"", "no format known"),
        (b"GIF89a" + bytes(600), "no format known"),
        (b"\x80", "damaged"),
        (b"PK\x03\x04", "truncated"),
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "holds no tensors"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "two tensors a"),
        ({"a\nb": torch.ones(1)}, "no text"),
        (save({}), "holds no tensors"),
        (save(TENSORS)[:-1], "truncated"),
    ]
    for content, part in cases:
        with pytest.raises(UserError) as error:
            read_tensors(put(tmp_path / "a.bin", content))
        one_line(error, "a.bin", part)
    with pytest.raises(UserError) as error:
        read_tensors(tmp_path / "nowhere")
    one_line(error, "nowhere")
    with pytest.raises(UserError) as error:
        read_tensors(tmp_path)
    one_line(error, tmp_path)


@pytest.mark.parametrize("name", [*FORMATS, "zip"])
def test_cut_and_flipped_files_of_each_format(tmp_path, name):
    if name == "zip":
        torch.save({"state_dict": TENSORS}, tmp_path / "good")
    right = FORMATS[name] if name in FORMATS else (tmp_path / "good").read_bytes()
    generator, refused = random.Random(2), 0
    for turn in range(200):
        changed = bytearray(right)
        if turn % 2:
            del changed[generator.randrange(len(changed)) :]
        else:
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        try:
            read_tensors(put(tmp_path / "a.bin", bytes(changed)))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and "a.bin" in str(error)
    assert refused > 20


def test_what_is_written_is_what_the_library_writes(tmp_path):
    kinds = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "int8", "bool")
    content = {f"{kind} ä": torch.arange(7).to(getattr(torch, kind)) for kind in kinds}
    content |= {"turned": torch.randn(3, 4).T.contiguous(), "b": torch.tensor(1.5)}
    content |= {"none": torch.empty(0, 2)}
    for metadata in (None, {"format": "pt"}):
        write_tensors(tmp_path / "a", content, metadata)
        assert (tmp_path / "a").read_bytes() == save(content, metadata)


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


def test_a_file_that_would_execute_code(maskgit, tmp_path):
    torch.save({"model": taming_tokenizer(), "args": Runs()}, tmp_path / "a.pt")
    done = maskgit("import", "a.pt", "dest")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("maskgit: a.pt is refused: it names")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_nothing_half_written(files, tmp_path):
    """Where the disk has no room, and after an import that was killed."""
    (tmp_path / ".partial-dest" / "vqgan").mkdir(parents=True)
    code = f"""
import resource, sys
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from maskgit.commands.main import main
sys.exit(main(["import", {files["last.ckpt"]!r}, "{tmp_path}/dest"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
    import_files([files["last.ckpt"]], tmp_path / "dest", say=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


def test_the_command(maskgit, files, tmp_path):
    done = maskgit("import", "--heads", "2", files["vq_ds16_c2i.pt"], files["halton.pth"], "h")
    assert done.returncode == 0, done.stderr
    assert "Halton-MaskGIT transformer" in done.stdout and done.stderr == ""
    done = maskgit("sample", "--model", "h", "--class", "tench", "--steps", "2", "--out", "a.png")
    assert done.returncode == 0, done.stderr
    done = maskgit("import", files["last.ckpt"])
    assert done.returncode == 2 and "DEST" in done.stderr


def test_the_names_of_imagenet():
    names = imagenet()
    assert len(set(names)) == 1000
    assert [names[i] for i in (1, 282, 404)] == ["goldfish", "tiger cat", "airliner"]


# ---------------------------------------------------------------- memory

MEASURE = """
import pathlib, sys, time
from maskgit.importing import import_files
def status(name):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) * 1024
import_files([sys.argv[1]], sys.argv[2] + "/warm", say=str)  # what is imported when first needed
pathlib.Path("/proc/self/clear_refs").write_text("5")
before, start = status("VmRSS"), time.perf_counter()
import_files([sys.argv[3]], sys.argv[2] + "/dest", *map(int, sys.argv[4:]), say=str)
print(status("VmHWM") - before, time.perf_counter() - start)
"""


def memory(tmp_path, warm, file, *heads):
    """Bytes and seconds that an import takes, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, warm, tmp_path, file, *heads]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bytes_taken, seconds = done.stdout.split()
    return int(bytes_taken), float(seconds)


@pytest.mark.parametrize("kind", ["zip", "stacked", "flax", "safetensors"])
def test_memory_is_under_three_times_the_file(files, tmp_path, kind):
    if kind == "flax":
        content = flax_bytes(draw(narrow(listed("maskgit_flax_to_port.txt"), 2)))
    else:
        tensors = draw(narrow(listed("taming_f16_16384.txt"), 2))
        content = {"stacked": stacked_bytes, "safetensors": save}.get(kind, dict)(tensors)
    file = tmp_path / "model"
    put(file, content)
    taken, _ = memory(tmp_path, files["last.ckpt"], file)
    assert taken < 3 * file.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "flax"])
def test_a_file_of_a_gigabyte(files, tmp_path, kind, capsys):
    file = tmp_path / "model"
    if kind == "zip":
        tensors = halton_transformer(side=24, width=1536, depth=12)
        put(file, {"model_state_dict": tensors})
        del tensors
        taken, seconds = memory(tmp_path, files["last.ckpt"], file, 16)
    else:
        put(file, flax_bytes(official_transformer(side=16, width=1152, heads=16, depth=16)))
        taken, seconds = memory(tmp_path, files["last.ckpt"], file)
    size = file.stat().st_size
    with capsys.disabled():
        print(f"\n{kind}: {size / 1e9:.2f} GB, {taken / size:.2f} times that, {seconds:.0f} s")
    assert taken < 3 * size
