"""What importing checks, says and records; what comes of imported folders: the originals' tokens
by their presets, and training that goes on from one."""

import json

import numpy as np
import pytest
import straight_transformer as straight
import torch
from conftest import one_line
from runs import names, prepare, run
from test_orders import halton_trace, maskgit_trace
from tiny_published import (
    flax_bytes,
    llamagen_tokenizer,
    official_tokenizer,
    put,
    taming_tokenizer,
)

from maskgit import MaskGIT, Pipeline, published_files
from maskgit.checkup import foreign
from maskgit.common import UserError
from maskgit.common.folder import file_hash, write_json
from maskgit.importing import import_files, mismatch, recognise
from maskgit.model import MaskGITConfig
from maskgit.published_files import File
from maskgit.trace import recorder
from vqgan import VQGANConfig


def silent(line):
    """What an import says, where a test does not ask."""


# ---------------------------------------------------------------- checks and records


@pytest.mark.parametrize(
    ("family", "file", "size"),
    [
        ("official MaskGIT", "tokenizer_imagenet512_checkpoint", 512),
        ("official MaskGIT", "tokenizer_checkpoint", None),
        ("MaskGIT, ported", "maskgit-vqgan-imagenet-f16-256.bin", 256),
        ("MaskGIT, ported", "maskgit-vqgan-imagenet-f16-512.bin", 512),  # by whoever ports that
        ("MaskGIT, ported", "pytorch_model.bin", 256),
        ("MaskGIT, ported, MaskBit's names", "model.bin", 256),
    ],
)
def test_the_size_of_images_that_a_tokenizer_is_for(family, file, size):
    """Of one shape and with other weights: only the file's name or the family tells."""
    for side in (16, 32):
        config = MaskGITConfig(1024, 1000, [side, side])
        reason = mismatch(family, VQGANConfig(mult=[1] * 5), "official MaskGIT", config, file)
        if size in (None, 16 * side):
            assert reason is None
        else:
            assert reason == f"{file} is for images of {size}, and the transformer for {16 * side}"


def test_where_the_folder_comes(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    file = put(tmp_path / "files" / "last.ckpt", taming_tokenizer())
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    import_files([file], tmp_path / "link", say=silent)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "vqgan").is_dir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for dest in (".", "../here"):
        with pytest.raises(UserError) as error:
            import_files([file], dest, say=silent)
        one_line(error, "is the folder you are in")
    assert names(tmp_path) == ["files", "here", "link", "real"] and names(tmp_path / "here") == []


def test_what_is_left_out_is_said_and_recorded(tmp_path):
    extra = {
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(2),
        "loss.discriminator.main.0.bias": torch.full((2,), torch.nan),
        "loss.discriminator.main.0.weight": torch.ones(2),
    }
    said, file = [], put(tmp_path / "last.ckpt", taming_tokenizer() | extra)
    import_files([file], tmp_path / "dest", say=said.append)
    left = "3 tensors left out: loss.perceptual_loss. (1), loss.discriminator. (2)"
    assert f"last.ckpt: {left}" in said
    about = json.loads((tmp_path / "dest/source.json").read_text())["parts"]["vqgan"]
    assert about["ballast"] == ["loss.perceptual_loss.", "loss.discriminator."]
    hidden = taming_tokenizer() | {"optimizer_of_mine.encoder.conv_in.weight": torch.ones(2)}
    with pytest.raises(UserError) as error:
        recognise(put(tmp_path / "a.pt", hidden))
    one_line(error, "1 left over", "optimizer_of_mine")


def test_numbers_that_are_not_finite(tmp_path):
    for name, number in (("quantize.embedding.weight", "nan"), ("quant_conv.bias", "inf")):
        tensors = taming_tokenizer()
        tensors[name].view(-1)[3] = float(number)
        with pytest.raises(UserError) as error:
            import_files([put(tmp_path / "a.pt", tensors)], tmp_path / "dest", say=silent)
        one_line(error, "a.pt", "1 of its tensors", "not finite", name.split(".")[0][:5])
    assert not (tmp_path / "dest").exists()


def test_long_names_are_cut(tmp_path):
    with pytest.raises(UserError) as error:
        recognise(put(tmp_path / "a.pt", {"x" * 999: torch.ones(1)}))
    one_line(error, "matches no tokenizer")
    assert "x" * 200 not in str(error.value)


def test_a_published_file_is_known_by_its_hash_or_its_name(tmp_path, monkeypatch):
    for folder, name in (("vq-f8", "model.ckpt"), ("mine", "model.ckpt"), ("mine", "b.ckpt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        put(tmp_path / folder / name, taming_tokenizer())
    ours = file_hash(tmp_path / "mine" / "b.ckpt")
    listed = {
        "a.ckpt": File("a.ckpt", "", published_files.LATENT, sha256=ours),
        "model.ckpt": File("model.ckpt", "", published_files.LLAMAGEN, sha256="0" * 64),
    }
    monkeypatch.setattr(published_files, "FILES", published_files.FILES | listed)
    for file, licence, told in (
        ("vq-f8/model.ckpt", "latent-diffusion", "warning: not the file that was published as"),
        ("mine/model.ckpt", "LlamaGen", "warning: not the file that was published as model.ckpt"),
        ("mine/b.ckpt", "latent-diffusion", "the published file a.ckpt, by its SHA-256"),
    ):
        part = recognise(str(tmp_path / file))
        assert licence in part.licence and told in next(part.describe())


# ---------------------------------------------------------------- what comes of imported folders

HEADS = 4


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder imported from files of the official layout, for 4 x 4 tokens, and their arrays."""
    folder, arrays = tmp_path_factory.mktemp("official"), straight.official_weights(heads=HEADS)
    arrays = {f"params/{name.removeprefix('params/')}": array for name, array in arrays.items()}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    contents = {"tokenizer": official_tokenizer(), "transformer": tensors}
    files = [put(folder / name, flax_bytes(content)) for name, content in contents.items()]
    import_files(files, folder / "model", say=silent)
    return folder / "model", arrays


@pytest.fixture(scope="module")
def halton(tmp_path_factory):
    """The same of Halton-MaskGIT's, with 6 classes."""
    folder, arrays = tmp_path_factory.mktemp("halton"), straight.halton_weights(codes=16384)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    contents = {"vq.pt": llamagen_tokenizer(), "halton.pth": tensors}
    files = [put(folder / name, content) for name, content in contents.items()]
    import_files(files, folder / "model", heads=HEADS, say=silent)
    return folder / "model", arrays


def sampled(folder, label, seed, preset):
    """The tokens of one image after each step."""
    steps = []
    pipe = Pipeline.from_pretrained(folder, "cpu", "fp32")
    pipe.sample([label], seed=seed, preset=preset, on_step=recorder(steps))
    return [step.tokens[0].tolist() for step in steps]


def test_a_preset_gives_the_tokens_of_the_official_files(official):
    folder, arrays = official

    def network(tokens):
        tokens = np.where(tokens == 1024, -1, tokens)
        return straight.official(arrays, tokens, np.array([7]))

    expected = maskgit_trace(network, np.full(16, 1024), 5, 8, 4.5, mask=1024)
    assert sampled(folder, 7, 5, "maskgit") == [tokens.tolist() for tokens in expected]


def test_a_preset_gives_the_tokens_of_haltons_files(halton):
    folder, arrays = halton
    cond, uncond = (
        lambda tokens, label=label: straight.halton(arrays, tokens, np.array([label]), HEADS)
        for label in (2, 6)
    )
    expected = halton_trace(cond, uncond, np.full(16, 16384), 5, 4, 32, 1.0)
    assert sampled(folder, 2, 5, "halton") == [tokens.tolist() for tokens in expected]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["official", "halton"])
def test_train_goes_on_from_an_imported_folder(kind, request, tmp_path):
    """With other classes and another grid."""
    source, _ = request.getfixturevalue(kind)
    words = prepare(tmp_path, "maskgit", steps=2)
    (tmp_path / "photos" / "left").rename(tmp_path / "photos" / "goldfish")
    shape = dict(width=48, depth=2, heads=HEADS, ffn="null")
    shape["architecture"] = {"official": "official", "halton": "modern"}[kind]
    words += [f"init={source}", f"tokenizer={source}", "data.size=[64, 96]", "run=one"]
    words += [f"model.{name}={value}" for name, value in shape.items()]
    status, out, err = run(tmp_path, words)
    assert status == 0, out + err
    assert "warning" not in out + err
    assert "positions interpolated from 4 x 4 to 4 x 6 tokens" in out
    if kind == "official":
        assert "of its 1000 classes 1 kept, 1 added, which start as the mean of its" in out
        assert "a label for no class added" in out
    else:
        assert "of its 6 classes 0 kept, 2 added, which start as no class" in out
    trained = MaskGIT.from_pretrained(tmp_path / "one" / "export").config
    assert (trained.grid, trained.num_classes, trained.null_label) == ([4, 6], 2, 2)


def test_a_tokenizer_of_another_family_is_said(tmp_path):
    kinds = {"vqgan": "LlamaGen", "transformer": "Halton-MaskGIT base"}
    for name, families in (("a", kinds), ("b", {"vqgan": "taming"}), ("c", {})):
        about = dict.fromkeys(("file", "sha256", "licence"), "")
        parts = {kind: about | {"family": family} for kind, family in families.items()}
        (tmp_path / name).mkdir()
        content = {"format_version": 1, "parts": parts, "files": {}}
        write_json(tmp_path / name / "source.json", content)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert [line for other in (a, c) for line in foreign(a, other)] == []
    assert next(foreign(a, b)).startswith("warning: Halton-MaskGIT base was not trained on the")
