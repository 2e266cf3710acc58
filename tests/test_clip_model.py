"""CLIP's features against those of open_clip and transformers, through files of each layout.

The weights are random, with a seed; features are of unit length, in fp32.
"""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import one_line
from pictures import drawings
from safetensors.torch import save_file

import clip.recipes
from clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from clip.huggingface import save_huggingface
from maskgit.common import UserError

CLOSE = 1e-5
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}
SIGLIP_TEXT = {
    **TEXT,
    **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    **{"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
}
CONFIGS = {  # of OpenCLIP
    "vit": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "quick": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    # As in H and g: a head has another width than the 64 (here 16) that everybody infers, and the
    # feed-forward is no multiple.
    "heads": {
        "embed_dim": 24,
        "vision_cfg": {**VISION, "width": 40, "head_width": 10, "mlp_ratio": 4.3637},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
    "clipa": {
        "embed_dim": 24,
        "vision_cfg": {
            **VISION,
            **{"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        },
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"},
    },
    "custom text": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {**VISION, "image_size": [32, 48]},
        "text_cfg": TEXT,
    },
    "siglip": {
        "embed_dim": 48,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            **{"image_size": 44, "timm_model_name": "vit_tiny_patch8_siglip_44"},
            **{"timm_pool": "map", "timm_proj": "none"},
        },
        "text_cfg": SIGLIP_TEXT,
    },
    "timm": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": ""},
        "text_cfg": TEXT,
    },
    "timm mlp": {
        "embed_dim": 24,
        "vision_cfg": {
            **{"image_size": 64, "timm_model_name": "test_resnet", "timm_pool": "avg"},
            "timm_proj": "mlp",
        },
        "text_cfg": TEXT,
    },
    "timm classifier": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {
            **{"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token"},
            "timm_proj": None,
        },
        "text_cfg": TEXT,
    },
}


@pytest.fixture(scope="module", autouse=True)
def tiny_siglip():
    """A small network of SigLIP's design in timm, and its facts in our table."""
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def vit_tiny_patch8_siglip_44(num_classes=0, global_pool="map", **_):
        sizes = {"img_size": 44, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
        kind = {"class_token": False, "num_classes": num_classes, "global_pool": global_pool}
        return VisionTransformer(**sizes, **kind)

    vit_tiny_patch8_siglip_44.__module__ = __name__
    register_model(vit_tiny_patch8_siglip_44)
    clip.recipes.SIGLIPS["tiny"] = (48, 2, 4, None, 32, 2, 4, None)
    clip.recipes.TIMM_SIGLIPS["tiny"] = "tiny"
    yield
    del clip.recipes.SIGLIPS["tiny"], clip.recipes.TIMM_SIGLIPS["tiny"]


def shaken(model, seed=0):
    """`model` with every number of its own, in eval mode: norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name not in ("logit_scale", "logit_bias"):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor += noise.abs() * 0.3 if name.endswith("running_var") else noise * 0.05
    return model.eval()


def open_model(name):
    torch.manual_seed(0)
    config = {k: v for k, v in CONFIGS[name].items() if k != "custom_text"}
    custom = CONFIGS[name].get("custom_text")
    return shaken((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config))


def save_folder(folder, name, model, file="open_clip_pytorch_model.bin", **pixels):
    """A folder as OpenCLIP publishes them."""
    content = {"model_cfg": CONFIGS[name], "preprocess_cfg": {**OPENAI, **pixels}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    state = model.state_dict()
    if file.endswith(".safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file)
    return folder


def inputs(size, rows=99, context=12):
    """Normalised pixels, and texts of all lengths: the end token is the largest id, then come 0."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(5, 3, *size, generator=generator)
    ids = torch.randint(1, rows - 2, (5, context), generator=generator)
    for row, length in zip(ids, (2, 3, 7, context - 1, context), strict=True):
        row[length - 1], row[length:] = rows - 1, 0
    return pixels, ids


def unit(features):
    return F.normalize(features, dim=-1)


@torch.no_grad()
def features(model, pixels, ids):
    return model.encode_image(pixels), model.encode_text(ids)


def close(ours, theirs):
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        assert (own - other).abs().max() < CLOSE


@pytest.mark.parametrize("name", CONFIGS)
def test_features_equal_open_clips(tmp_path, name):
    theirs = open_model(name)
    safe = name in ("vit", "siglip")
    file = "open_clip_model.safetensors" if safe else "open_clip_pytorch_model.bin"
    ours = CLIP.from_pretrained(save_folder(tmp_path, name, theirs, file))
    pixels, ids = inputs(ours.config.image.size)
    with torch.no_grad():
        expected = unit(theirs.encode_image(pixels)), unit(theirs.encode_text(ids))
    assert len(torch.unique(expected[0].round(decimals=3), dim=0)) == 5  # not all the same
    close(features(ours, pixels, ids), expected)
    assert torch.equal(ours.logit_scale, theirs.logit_scale)
    assert (ours.logit_bias is None) == (theirs.logit_bias is None)
    assert name.startswith("timm") == (ours.config.image.tower == "timm")
    ours.save_pretrained(tmp_path / "own")  # and once more through our own folder
    close(features(CLIP.from_pretrained(tmp_path / "own"), pixels, ids), expected)


def test_a_network_of_siglip_becomes_our_own_vit(tmp_path):
    model = CLIP.from_pretrained(save_folder(tmp_path, "siglip", open_model("siglip")))
    image, text = model.config.image, model.config.text
    assert (image.tower, image.pool, image.eps) == ("vit", "attention", 1e-6)
    assert (text.activation, text.causal, text.bias) == ("gelu_tanh", False, True)
    assert (model.config.loss, model.config.max_scale) == ("sigmoid", None)


HF_TEXT = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 12, "eos_token_id": 98},
    **{"bos_token_id": 97, "pad_token_id": 98},
}
HF_IMAGE = {
    **{"hidden_size": 40, "intermediate_size": 100, "num_hidden_layers": 2, "image_size": 32},
    **{"num_attention_heads": 4, "patch_size": 8},
}


def transformers_model(kind, **text):
    config = {"text_config": {**HF_TEXT, **text}, "vision_config": HF_IMAGE}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(**config, projection_dim=24)
        return shaken(transformers.CLIPModel(config))
    config["text_config"]["projection_size"] = 40
    return shaken(transformers.SiglipModel(transformers.SiglipConfig(**config)))


def processor(kind, folder, **options):
    name = "CLIPImageProcessor" if kind == "clip" else "SiglipImageProcessor"
    size = {"shortest_edge": 32} if kind == "clip" else {"height": 32, "width": 32}
    crop = {"crop_size": {"height": 32, "width": 32}} if kind == "clip" else {}
    content = {"image_processor_type": name, "size": size, **crop, "resample": 3, **options}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


@torch.no_grad()
def transformers_features(model, pixels, ids):
    image = model.get_image_features(pixel_values=pixels)
    text = model.get_text_features(input_ids=ids)
    return [unit(getattr(f, "pooler_output", f)) for f in (image, text)]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("clip", {}), ("clip", {"hidden_act": "gelu", "eos_token_id": 2}), ("siglip", {})],
)
def test_features_equal_transformers(tmp_path, kind, text):
    theirs = transformers_model(kind, **text)
    theirs.save_pretrained(tmp_path)
    processor(kind, tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    pixels, ids = inputs((32, 32))
    close(features(ours, pixels, ids), transformers_features(theirs, pixels, ids))
    assert ours.config.resize == ("crop" if kind == "clip" else "squash")
    assert ours.config.mean == (OPENAI["mean"] if kind == "clip" else [0.5] * 3)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_folder_that_we_write_is_loaded_by_transformers(tmp_path, kind):
    siglip = kind == "siglip"
    config = CLIPConfig(
        embed=64 if siglip else 48,
        image=ImageConfig(
            **{"size": [32, 32], "patch": 8, "width": 64, "depth": 2, "heads": 4},
            **({"pool": "attention", "activation": "gelu_tanh", "eps": 1e-6} if siglip else {}),
        ),
        text=TextConfig(merges=None, vocabulary=99, context=12, width=32, depth=2, heads=4)
        if not siglip
        else TextConfig(
            **{"merges": None, "vocabulary": 99, "context": 12, "width": 32, "depth": 2},
            **{"heads": 2, "causal": False, "bias": True, "eps": 1e-6},
        ),
        loss="sigmoid" if siglip else "infonce",
    )
    torch.manual_seed(0)
    ours = shaken(CLIP(config))
    save_huggingface(ours, tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    pixels, ids = inputs((32, 32))
    close(features(ours, pixels, ids), transformers_features(model, pixels, ids))
    assert torch.equal(model.logit_scale.flatten(), ours.logit_scale.detach().flatten())
    again = CLIP.from_pretrained(tmp_path)
    close(features(again, pixels, ids), features(ours, pixels, ids))
    assert (again.config.mean, again.config.resize) == (config.mean, config.resize)
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    picture = drawings((64, 48), 1)
    got = images(picture, return_tensors="pt")["pixel_values"]
    assert (got - ours.preprocess(picture)).abs().mean() < 0.02  # torchvision's antialiasing


def test_what_transformers_does_not_have_is_not_written(tmp_path):
    config = CLIPConfig(
        embed=16,
        image=ImageConfig(size=[32, 64], patch=8, width=32, depth=1, heads=2),
        text=TextConfig(merges=10, context=8, width=32, depth=1, heads=2),
    )
    with pytest.raises(UserError) as error:
        save_huggingface(CLIP(config), tmp_path / "none")
    one_line(error, "[32, 64]", "SigLIP")
    assert not (tmp_path / "none").exists()
