"""Folders of OpenCLIP and of Hugging Face, here and on the hub: what they bring, and what is
refused."""

import json

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from conftest import one_line
from test_clip_weights import SMALL, agree, theirs

from clip import CLIP
from maskgit.common import UserError


def folder(tmp_path, config=SMALL, **change):
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({**content, **change}))
    torch.save(theirs(config).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    return tmp_path


def test_an_openclip_folder_brings_its_recipe(tmp_path):
    ours = CLIP.from_pretrained(folder(tmp_path))
    agree(ours, theirs())
    assert (ours.config.mean, ours.config.std) == ([0.5] * 3, [0.5] * 3)
    assert ours.config.image.activation == "quick_gelu"
    by_file = CLIP.from_pretrained(tmp_path / "open_clip_pytorch_model.bin")
    assert by_file.config == ours.config


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_cfg", {"ls_init_value": 0.1}, "ls_init_value=0.1"),
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type=avg"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name=roberta-base"),
        ("text_cfg", {"pool_type": "eos"}, "pool_type=eos"),
        ("vision_cfg", {"layers": None}, "describes no CLIP"),
        ("vision_cfg", {"layers": 3}, "image.depth is 3, and by its tensors 2"),
    ],
)
def test_openclip_folders_that_are_refused(tmp_path, part, change, message):
    folder(tmp_path)
    config = {**SMALL, part: {**SMALL[part], **change}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path)
    one_line(error, message)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path)
    one_line(error, "holds no CLIP", "config.json", "open_clip_config.json", "it has nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path)
    one_line(error, "holds no CLIP that is known here")
    torch.save(theirs().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path)
    one_line(error, "model_type", "bert", "clip")


def test_a_huggingface_folder_without_its_preprocessor_warns(tmp_path):
    import transformers

    config = transformers.CLIPConfig(
        text_config={
            **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "eos_token_id": 98},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 12},
        },
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
            **{"num_hidden_layers": 1, "num_attention_heads": 2},
        },
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"preprocessor_config\.json is missing"):
        assert CLIP.from_pretrained(tmp_path).config.resize == "crop"
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    ours = CLIP.from_pretrained(tmp_path)
    assert (ours.config.mean, ours.config.interpolation) == ([0.5] * 3, "bilinear")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**half, "size": 40}))
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path)
    one_line(error, "scales images to 40", "32x32")
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["eos_token_id"] = 5
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        CLIP.from_pretrained(tmp_path)
    one_line(error, "the end token 5 is not the last of 99 ids")


def test_names_without_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, parts in (
        ("openai/clip-vit-base-patch32", ["model.safetensors", "one folder and pass its path"]),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", ["open_clip_config.json"]),
        ("ViT-B-32/openai", ["ViT-B-32.pt", "pass the path"]),
        ("ViT-B-32/laion2b_s34b_b79k", ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]),
        ("ViT-B-32/laion2b", ["did you mean"]),
        ("ViT-B-32.pt", ["no file ViT-B-32.pt"]),
        ("models/ViT-B-32.pt", ["no file models/ViT-B-32.pt"]),
        ("emojo", ["no model at emojo", "emoji"]),
    ):
        with pytest.raises(UserError) as error:
            CLIP.from_pretrained(name)
        one_line(error, name, *parts)


def test_a_hub_that_has_only_bin(tmp_path, monkeypatch):
    """The hub's two functions give what a repository without safetensors would."""
    fetched = []

    def download(name, file, revision):
        fetched.append((name, file, revision))
        torch.save(theirs().state_dict(), tmp_path / file)

    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    agree(CLIP.from_pretrained("someone/small", revision="v1"), theirs())
    assert fetched == [("someone/small", "open_clip_pytorch_model.bin", "v1")]
