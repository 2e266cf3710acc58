"""The table of published recipes, against the tables of OpenCLIP."""

import json
from dataclasses import asdict

import open_clip
import pytest
import torch

import clip.recipes
from clip import CLIP
from clip.layouts import claims, contradiction, measure, to_native
from clip.recipes import recipe_config, recipes


def clean(config):
    """What decides the features, without names."""
    content = asdict(config)
    for name in ("recipe", "scale", "bias", "max_scale", "dropout"):
        del content[name]
    for tower in ("image", "text"):
        content[tower]["hidden"] = content[tower]["hidden"] or 4 * content[tower]["width"]
    return content


@pytest.mark.parametrize("name", [name for name in recipes() if "convnext" not in name])
def test_recipes_are_openclips(tmp_path, name):
    model, training = name.split("/")
    known = open_clip.pretrained.get_pretrained_cfg(model, training)
    assert known, f"OpenCLIP has no {name}"
    config = open_clip.get_model_config(model)
    assert config
    pixels = {k: known[k] for k in ("mean", "std", "interpolation", "resize_mode")}
    content = {
        "model_cfg": {**config, "quick_gelu": bool(known.get("quick_gelu"))},
        "preprocess_cfg": pixels,
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    expected, ours = clean(clip.openclip.openclip_config(tmp_path)), clean(recipe_config(name))
    if expected["image"]["tower"] == "resnet":
        for config in (expected, ours):  # which have no such things
            for field in ("patch", "depth", "hidden", "activation"):
                config["image"].pop(field)
    assert ours == expected
    recipe = recipes()[name]
    if recipe.hub:
        assert known["hf_hub"] == f"{recipe.hub}/"
    else:
        assert known["url"].endswith(f"/{recipe.file}")
        assert recipe.sha256 in known["url"]
        assert recipe.sha256 or "metaclip" in name


def test_convnext_recipes():
    for name in (name for name in recipes() if "convnext" in name):
        model, training = name.split("/")
        config = open_clip.get_model_config(model)
        ours = recipe_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        assert ours.image.name == vision["timm_model_name"]
        assert (ours.image.projection, ours.image.size[0]) == (
            vision["timm_proj"],
            vision["image_size"],
        )
        assert (ours.embed, ours.text.width) == (config["embed_dim"], text["width"])
        assert (ours.text.depth, ours.text.heads) == (text["layers"], text["heads"])
        known = open_clip.pretrained.get_pretrained_cfg(model, training)
        assert known["hf_hub"] == f"{recipes()[name].hub}/"


def test_what_shapes_tell():
    """From shapes alone (no memory): what a file of a recipe is measured to be is what the recipe
    says, and OpenAI's nine differ from each other."""
    others = ("ViT-H-14/dfn5b", "ViT-L-14-CLIPA/datacomp1b", "ViT-SO400M-14-SigLIP-384/webli")
    seen = []
    for name in (*others, *(name for name in recipes() if name.endswith("/openai"))):
        config = recipe_config(name)
        with torch.device("meta"):
            state = CLIP(config).state_dict()
        found = measure(state, name)
        assert found == claims(config)
        assert contradiction(config, found) is None
        assert found not in seen
        seen.append(found)
        assert to_native(state).keys() == state.keys()  # ours stay ours
    assert len(seen) == len(others) + 9
