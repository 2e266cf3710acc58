"""CLIP and SigLIP as Hugging Face's transformers keeps them: read from a folder, and written.

A folder has `config.json` (model_type clip or siglip), `preprocessor_config.json` and the weights.
"""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from clip.config import MEAN, MERGES, STD, CLIPConfig, ImageConfig, TextConfig
from clip.layouts import HEAD, HUGGINGFACE, rename
from clip.model import CLIP
from clip.recipes import SIGLIP
from maskgit.common import UserError, pick
from maskgit.common.folder import read_json, write_json, write_tensors

ACTIVATIONS = {  # theirs: ours
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
CLIP_TOWER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP_TOWER = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    **{"num_hidden_layers": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # where a config does not say it
    "clip": (
        {
            **CLIP_TOWER,
            **{"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
            **{"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
        },
        {
            **CLIP_TOWER,
            **{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            **{"image_size": 224, "patch_size": 32},
        },
    ),
    "siglip": (
        {**SIGLIP_TOWER, "vocab_size": 32000, "max_position_embeddings": 64},
        {**SIGLIP_TOWER, "image_size": 224, "patch_size": 16},
    ),
}
FILTERS = {"2": "bilinear", "3": "bicubic"}  # PIL's numbers


def huggingface_config(folder: Path) -> CLIPConfig:
    """The recipe that a folder's config.json and preprocessor_config.json describe.

    Without the second one, what transformers takes for such a model, with a warning: a model that
    was trained with other means would get wrong features. Raises UserError for another kind of
    model, and for what our towers do not have.
    """
    where, content = folder / "config.json", read_json(folder / "config.json")
    if not isinstance(content, dict):
        raise UserError(f"{where} describes no model: it is no JSON object")
    kind = str(content.get("model_type"))
    defaults = pick(DEFAULTS, kind, f"model_type of {where}:")
    try:
        config = _config(where, kind, content, defaults)
        for name, value in _preprocessing(folder, kind, config.image.size).items():
            setattr(config, name, value)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} describes no {kind} model ({error!r}): fetch it again") from None
    return config


def _config(where: Path, kind: str, content: Any, defaults: Any) -> CLIPConfig:
    text, image = (
        {**default, **(content.get(name) or {}), **(content.get(f"{name}_dict") or {})}
        for default, name in zip(defaults, ("text_config", "vision_config"), strict=True)
    )
    clip, rows, end = kind == "clip", text["vocab_size"], text.get("eos_token_id")
    if clip and end not in (2, rows - 1):  # 2 means the largest id, as in the first releases
        raise UserError(
            f"{where}: the end token {end} is not the last of {rows} ids, where our text tower "
            "looks for it"
        )
    if not clip and not image.get("vision_use_head", True):
        raise UserError(f"{where}: SigLIP without its head has no features to compare")
    ids = {"merges": MERGES} if clip and rows == 49408 else {"merges": None, "vocabulary": rows}
    return CLIPConfig(
        embed=content.get("projection_dim", 512) if clip else image["hidden_size"],
        image=ImageConfig(
            size=[int(image["image_size"])] * 2,
            patch=int(image["patch_size"]),
            pool="class" if clip else "attention",
            **_tower(image),
        ),
        text=TextConfig(
            context=text["max_position_embeddings"],
            causal=clip,
            bias=not clip,
            **ids,
            **_tower(text),
        ),
        **({} if clip else SIGLIP),
    )


def _tower(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "activation": pick(ACTIVATIONS, config["hidden_act"], "hidden_act"),
        "eps": config["layer_norm_eps"],
    }


def _preprocessing(folder: Path, kind: str, size: list[int]) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        warnings.warn(
            f"{path} is missing: images are scaled and normalised as {kind} models usually are, "
            "which need not be how this one was trained",
            stacklevel=2,
        )
        return {}
    content, clip = read_json(path), kind == "clip"
    scaled = content.get("size", size[0])
    scaled = scaled.get("shortest_edge") or scaled if isinstance(scaled, dict) else scaled
    squash = isinstance(scaled, dict) or (not clip and not content.get("do_center_crop"))
    sides = [scaled["height"], scaled["width"]] if isinstance(scaled, dict) else [scaled, scaled]
    if sides != size:
        raise UserError(
            f"{path} scales images to {scaled}, and the model takes {size[0]}x{size[1]}"
        )
    normalize = content.get("do_normalize", True)
    return {
        "mean": content.get("image_mean", MEAN if clip else [0.5] * 3) if normalize else [0.0] * 3,
        "std": content.get("image_std", STD if clip else [0.5] * 3) if normalize else [1.0] * 3,
        "resize": "squash" if squash else "crop",
        "interpolation": pick(FILTERS, str(content.get("resample", 3)), f"resample of {path}:"),
    }


def to_huggingface(model: CLIP) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors as transformers' CLIPModel or SiglipModel has them; the tensors are the
    model's own. Raises UserError for a model that neither can be."""
    config, image, text = model.config, model.config.image, model.config.text
    kind = {
        ("class", True, False, "infonce"): "clip",
        ("attention", False, True, "sigmoid"): "siglip",
    }.get((image.pool, text.causal, text.bias, config.loss))
    if kind is None or image.tower != "vit" or image.size[0] != image.size[1]:
        raise UserError(
            "transformers has CLIP (class token, causal texts, InfoNCE) and SigLIP (attention "
            "pooling, texts to the end and with a bias, sigmoid), of a ViT for square images: "
            f"neither is {image.tower}, pool={image.pool}, size={image.size}, "
            f"causal={text.causal}, loss={config.loss}"
        )
    siglip = kind == "siglip"
    end = text.rows - 1 if text.merges is not None else 2
    content = {
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "model_type": kind,
        "text_config": {
            **_theirs(text),
            "model_type": f"{kind}_text_model",
            "vocab_size": text.rows,
            "max_position_embeddings": text.context,
            **({"projection_size": config.embed} if siglip else {"projection_dim": config.embed}),
            **{"bos_token_id": text.rows - 2, "eos_token_id": end, "pad_token_id": text.rows - 1},
        },
        "vision_config": {
            **_theirs(image),
            "model_type": f"{kind}_vision_model",
            "image_size": image.size[0],
            "patch_size": image.patch,
            **({} if siglip else {"projection_dim": config.embed}),
        },
        **({} if siglip else {"projection_dim": config.embed}),
    }
    return content, _their_state(model.state_dict(), siglip)


def _theirs(tower: ImageConfig | TextConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.hidden or 4 * tower.width,
        "hidden_act": names[tower.activation],
        "layer_norm_eps": tower.eps,
    }


def _their_state(state: dict[str, Tensor], siglip: bool) -> dict[str, Tensor]:
    projection = HEAD if siglip else ("text_projection.", "text.text_projection.")
    renames = tuple((ours, theirs) for theirs, ours in reversed((*HUGGINGFACE, projection)))
    found = {}
    for name, tensor in state.items():
        if ".attn.in_proj_" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                split = name.replace(".in_proj_", f".{part}_proj.")
                found[rename(split, renames)] = third
        else:
            found[rename(name, renames)] = tensor
    for name in ("logit_scale", "logit_bias") if siglip else ():
        found[name] = found[name].reshape(1)
    if siglip:
        found["vision_model.head.probe"] = found["vision_model.head.probe"].view(1, 1, -1)
    return found


def save_huggingface(model: CLIP, folder: str | Path) -> None:
    """Write a folder that transformers loads: config.json, preprocessor_config.json and
    model.safetensors. The tokenizer of OpenAI's models is not written: take their own."""
    folder = Path(folder)
    content, state = to_huggingface(model)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    write_json(folder / "config.json", content)
    config, (h, w) = model.config, model.config.image.size
    crop = config.resize == "crop"
    siglip = content["model_type"] == "siglip"
    preprocessing = {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        **{"do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True},
        **{"image_mean": config.mean, "image_std": config.std},
        "resample": next(int(n) for n, name in FILTERS.items() if name == config.interpolation),
        "size": {"shortest_edge": h} if crop else {"height": h, "width": w},
        "do_center_crop": crop,
        **({"crop_size": {"height": h, "width": w}} if crop else {}),
    }
    write_json(folder / "preprocessor_config.json", preprocessing)
