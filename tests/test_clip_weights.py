"""Published files of CLIP: their layouts, whose recipe they have, and what is refused."""

import hashlib
import json
import warnings
from dataclasses import replace

import open_clip
import pytest
import torch
from conftest import one_line
from safetensors.torch import save_file

from clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from clip.recipes import Recipe, recipes
from maskgit.common import UserError
from maskgit.evaluation.clip_model import open_clip_model

# A small model of OpenAI's design: heads of 64 channels, QuickGELU.
SMALL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 99, "width": 64, "heads": 1, "layers": 2},
}
RESNET = {
    **SMALL,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 16, "patch_size": None},
}


def theirs(config=SMALL):
    torch.manual_seed(0)
    return open_clip.CLIP(**config).eval()


@torch.no_grad()
def agree(ours, model, size=32):
    """Assert that both give the same features."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(1, 98, (2, 12), generator=generator)
    ids[:, 8:] = 98
    for own, other in (
        (ours.encode_image(pixels), model.encode_image(pixels, normalize=True)),
        (ours.encode_text(ids), model.encode_text(ids, normalize=True)),
    ):
        assert (own - other).abs().max() < 1e-5


@pytest.fixture
def small_recipe(monkeypatch):
    """SMALL as a known model, "small/test"."""
    config = CLIPConfig(
        24,
        ImageConfig(
            **{"size": [32, 32], "patch": 8, "width": 128, "depth": 2, "heads": 2},
            activation="quick_gelu",
        ),
        TextConfig(
            **{"merges": None, "vocabulary": 99, "context": 12, "width": 64, "depth": 2},
            **{"heads": 1, "activation": "quick_gelu"},
        ),
        recipe="small/test",
    )
    monkeypatch.setitem(recipes(), "small/test", Recipe(config, file="small_400m.pt"))
    return config


def scripted(model, path):
    """A TorchScript archive of `model`."""
    if not hasattr(torch.jit, "trace"):
        pytest.skip("this torch writes no TorchScript")
    ids = torch.full((1, 12), 98)
    size = 64 if isinstance(model.visual, open_clip.modified_resnet.ModifiedResNet) else 32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (torch.zeros(1, 3, size, size), ids), check_trace=False).save(path)
    return path


@pytest.mark.parametrize(("config", "size"), [(SMALL, 32), (RESNET, 64)])
def test_a_torchscript_archive_has_openais_recipe(tmp_path, config, size):
    model = theirs(config)
    for name, value in (("input_resolution", size), ("context_length", 12), ("vocab_size", 99)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))  # as OpenAI's archives have
    ours = CLIP.from_pretrained(scripted(model, tmp_path / "whatever.pt"))
    agree(ours, model, size)
    assert ours.config.recipe == "openai"
    assert ours.config.text.activation == "quick_gelu"
    assert ours.config.image.size == [size, size]


def test_an_archive_with_the_shapes_of_another_recipe_is_not_openais(tmp_path, small_recipe):
    path = scripted(theirs(), tmp_path / "whatever.pt")
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(path)
    one_line(error, "recipe=NAME", "small/test")


def half(state):
    """As OpenAI's files: what matrices multiply is fp16, the rest fp32."""
    return {k: v.half() if v.ndim > 1 else v for k, v in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
        lambda state: {**state, "logit_scale": state["logit_scale"].reshape(1)},
        lambda state: {
            **{
                k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in state.items()
            },
            "text.attn_mask": torch.zeros(12, 12),
            "text.transformer.embeddings.position_ids": torch.arange(12),
        },
    ],
)
def test_layouts_of_openclip(tmp_path, small_recipe, wrap):
    model = theirs()
    torch.save(wrap(model.state_dict()), tmp_path / "a.pt")
    ours = CLIP.from_pretrained(tmp_path / "a.pt", recipe="small/test")
    agree(ours, model)
    assert ours.config == small_recipe and not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_safetensors_and_half_precision(tmp_path, small_recipe):
    model = theirs()
    state = half(model.state_dict())
    save_file(state, tmp_path / "a.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items()})
    agree(CLIP.from_pretrained(tmp_path / "a.safetensors", recipe="small/test"), model)


def test_bare_weights_are_asked_about(tmp_path, small_recipe):
    torch.save(theirs().state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path / "a.pt")
    one_line(error, "a.pt", "heads, activation, mean, std", "recipe=NAME", "these fit: small/test")
    config = {**SMALL, "embed_dim": 28}
    torch.save(theirs(config).state_dict(), tmp_path / "b.pt")
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path / "b.pt")
    one_line(error, "none fits, nearest: small/test")
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path / "b.pt", recipe="ViT-B-32/opnai")
    one_line(error, "unknown recipe 'ViT-B-32/opnai'", "ViT-B-32/openai")


def test_a_command_takes_the_recipe_behind_the_file(tmp_path, small_recipe):
    torch.save(theirs().state_dict(), tmp_path / "a.pt")
    opened = open_clip_model(f"{tmp_path}/a.pt@small/test", torch.device("cpu"))
    direct = CLIP.from_pretrained(tmp_path / "a.pt", recipe="small/test").state_dict()
    assert all(torch.equal(direct[k], v) for k, v in opened.model.state_dict().items())
    assert opened.name == f"{tmp_path}/a.pt@small/test" and len(opened.sha256) == 64
    with pytest.raises(UserError) as error:
        open_clip_model(f"{tmp_path}/a.pt", torch.device("cpu"))
    one_line(error, "a.pt@NAME to a command")


def test_known_by_hash_or_by_name(tmp_path, monkeypatch, small_recipe):
    torch.save(theirs().state_dict(), tmp_path / "small_400m.pt")
    assert CLIP.from_pretrained(tmp_path / "small_400m.pt").config == small_recipe
    digest = hashlib.sha256((tmp_path / "small_400m.pt").read_bytes()).hexdigest()
    hashed = Recipe(replace(small_recipe, recipe="small/hashed"), "other.pt", sha256=digest[:8])
    monkeypatch.setitem(recipes(), "small/test", hashed)
    monkeypatch.setitem(recipes(), "small/hashed", hashed)
    assert CLIP.from_pretrained(tmp_path / "small_400m.pt").config.recipe == "small/hashed"
    # A name alone is nothing where the hash is known.
    torch.save(theirs().half().state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path / "other.pt")
    one_line(error, "recipe=NAME")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"embed_dim": 28}, "embed is 24, and by its tensors 28"),
        ({"vision_cfg": {**SMALL["vision_cfg"], "patch_size": 16}}, "image.patch is 8"),
        ({"vision_cfg": {**SMALL["vision_cfg"], "image_size": 64}}, "image positions is 16"),
        ({"vision_cfg": RESNET["vision_cfg"] | {"width": 64}}, "image.tower is vit"),
        ({"text_cfg": {**SMALL["text_cfg"], "context_length": 16}}, "text.context is 12"),
        ({"text_cfg": {**SMALL["text_cfg"], "layers": 3}}, "text.depth is 2"),
        ({"init_logit_bias": -10.0}, "loss is infonce, and by its tensors sigmoid"),
    ],
)
def test_a_recipe_that_contradicts_the_file(tmp_path, small_recipe, change, part):
    torch.save(theirs({**SMALL, **change}).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path / "a.pt", recipe="small/test")
    one_line(error, "a.pt contradicts its recipe, small/test", part)


class Runs:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


def test_a_file_that_would_execute_code(tmp_path, monkeypatch, small_recipe):
    monkeypatch.chdir(tmp_path)
    torch.save({**theirs().state_dict(), "extra": Runs()}, "open_clip_pytorch_model.bin")
    for source in ("open_clip_pytorch_model.bin", tmp_path):
        folder_config = {"model_cfg": SMALL}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(folder_config))
        with pytest.raises(UserError) as error:
            CLIP.from_pretrained(source)
        one_line(error, "refused", "builtins.eval")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_clip(tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    state = theirs().state_dict()
    del state["token_embedding.weight"]
    torch.save(state, tmp_path / "c.pt")
    (tmp_path / "d.safetensors").write_bytes(b"x" * 100)
    for name, part in (
        ("a.pt", "holds no CLIP"),
        ("b.pt", "holds a list"),
        ("c.pt", "text.token_embedding.weight"),
        ("d.safetensors", "truncated or foreign"),
    ):
        with pytest.raises(UserError) as error:
            CLIP.from_pretrained(tmp_path / name)
        one_line(error, name, part)
    state = theirs().state_dict()
    del state["visual.transformer.resblocks.1.ln_1.bias"]
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path)
    one_line(error, "visual.transformer.resblocks.1.ln_1.bias")


def test_our_own_folder(tmp_path, small_recipe):
    torch.manual_seed(0)
    model = CLIP(small_recipe).eval()
    model.save_pretrained(tmp_path / "whole" / "clip")
    for source in (
        tmp_path / "whole",
        tmp_path / "whole" / "clip",
        tmp_path / "whole" / "clip" / "model.safetensors",
    ):
        ours = CLIP.from_pretrained(source)
        assert ours.config == small_recipe
        for name, tensor in model.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor)
        with pytest.raises(UserError) as error:
            CLIP.from_pretrained(source, recipe="ViT-B-32/openai")
        one_line(error, "has its recipe", "leave recipe=ViT-B-32/openai out")
