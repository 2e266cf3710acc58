"""The recipe in an OpenCLIP folder: `open_clip_config.json`, its model_cfg and preprocess_cfg."""

import math
from pathlib import Path
from typing import Any

from clip.config import MEAN, MERGES, STD, CLIPConfig, ImageConfig, TextConfig
from clip.recipes import SIGLIP, siglip_tower
from maskgit.common import UserError, pick
from maskgit.common.folder import read_json

# What only other networks than ours do, and what it is where it is not done.
FOREIGN = {
    **{"ls_init_value": None, "attentional_pool": False, "qk_norm": False, "embed_cls": False},
    **{"scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False},
    **{"scale_attn": False, "scale_fc": False, "hf_model_name": None, "proj_type": "linear"},
    **{"timm_proj_bias": False},
}
POOLS = {  # no_ln_pre, pool_type, final_ln_after_pool; of one token, the order of the last is free
    (False, "tok", False): "class",
    (False, "tok", True): "class",
    (True, "avg", True): "mean",
}
RESIZES = {"shortest": "crop", "squash": "squash"}
FILTERS = {"bicubic": "bicubic", "bilinear": "bilinear"}
# "class" of a network of timm is what that network does by itself.
TIMM_POOLS = {"": "class", "token": "class", "avg": "mean", "map": "attention"}
PROJECTIONS = {"linear": "linear", "mlp": "mlp", "none": "none", "": "classifier"}


def openclip_config(folder: Path) -> CLIPConfig:
    """The recipe that a folder's open_clip_config.json describes.

    Raises UserError where it is damaged, and where the model has what our towers do not.
    """
    where = folder / "open_clip_config.json"
    content = read_json(where)
    try:
        return _config(where, content["model_cfg"], content.get("preprocess_cfg") or {})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} describes no CLIP ({error!r}): fetch it again") from None


def _config(where: Path, model: dict[str, Any], pixels: dict[str, Any]) -> CLIPConfig:
    vision, text = model["vision_cfg"], model["text_cfg"]
    for part in (vision, text):
        for name, usual in FOREIGN.items():
            if part.get(name, usual) not in (usual, None):
                raise UserError(
                    f"{where}: {name}={part[name]} is of a network that is not known here"
                )
    if "multimodal_cfg" in model:
        raise UserError(f"{where}: CoCa, which has a third network, is not known here")
    sigmoid = model.get("init_logit_bias") is not None
    training = {**SIGLIP} if sigmoid else {}
    for name in ("scale", "bias"):
        if model.get(f"init_logit_{name}") is not None:
            value = float(model[f"init_logit_{name}"])
            training[name] = math.exp(value) if name == "scale" else value
    return CLIPConfig(
        embed=model["embed_dim"],
        image=_image(where, vision, bool(model.get("quick_gelu"))),
        text=_text(where, text, bool(model.get("quick_gelu"))),
        **{
            **training,
            "mean": pixels.get("mean", MEAN),
            "std": pixels.get("std", STD),
            "resize": pick(RESIZES, pixels.get("resize_mode", "shortest"), "resize_mode"),
            "interpolation": pick(FILTERS, pixels.get("interpolation", "bicubic"), "interpolation"),
        },
    )


def _image(where: Path, vision: dict[str, Any], quick: bool) -> ImageConfig:
    sides = vision.get("image_size", 224)
    size = [sides, sides] if isinstance(sides, int) else list(sides)
    if vision.get("timm_model_name"):
        return _timm(where, vision, size)
    width, layers = vision.get("width", 768), vision.get("layers", 12)
    heads = vision.get("head_width", 64)
    if isinstance(layers, list):
        return ImageConfig("resnet", size, width=width, blocks=layers, heads=width * 32 // heads)
    flags = (
        bool(vision.get("no_ln_pre")),
        vision.get("pool_type", "tok"),
        bool(vision.get("final_ln_after_pool")),
    )
    if flags not in POOLS:
        raise UserError(
            f"{where}: no_ln_pre={flags[0]}, pool_type={flags[1]}, final_ln_after_pool={flags[2]} "
            "are together in no network that is known here"
        )
    return ImageConfig(
        size=size,
        patch=vision.get("patch_size", 16),
        width=width,
        depth=layers,
        heads=width // heads,
        hidden=int(width * vision.get("mlp_ratio", 4.0)),
        pool=POOLS[flags],
        activation=_activation(vision, quick),
        eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
    )


def _timm(where: Path, vision: dict[str, Any], size: list[int]) -> ImageConfig:
    name, pool = vision["timm_model_name"], vision.get("timm_pool", "avg")
    projection = pick(PROJECTIONS, vision.get("timm_proj", "linear") or "", "timm_proj")
    tower = siglip_tower(name, size[0])
    if tower and pool == "map" and projection == "none":
        return tower
    if pool not in TIMM_POOLS:
        raise UserError(f"{where}: timm_pool={pool} is of a network that is not known here")
    return ImageConfig("timm", size, name=name, projection=projection, pool=TIMM_POOLS[pool])


def _text(where: Path, text: dict[str, Any], quick: bool) -> TextConfig:
    causal, pool = not text.get("no_causal_mask"), text.get("pool_type", "argmax")
    if (causal, pool) not in ((True, "argmax"), (False, "last")):
        raise UserError(
            f"{where}: a text tower with pool_type={pool} and no_causal_mask={not causal} is not "
            "known here"
        )
    rows, width = text.get("vocab_size", 49408), text.get("width", 512)
    other = text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs") or rows != 49408
    ids = {"merges": None, "vocabulary": rows} if other else {"merges": MERGES}
    return TextConfig(
        **ids,
        context=text.get("context_length", 77),
        width=width,
        depth=text.get("layers", 12),
        heads=text.get("heads", 8),
        hidden=int(width * text.get("mlp_ratio", 4.0)),
        causal=causal,
        bias=bool(text.get("proj_bias")),
        activation=_activation(text, quick),
        eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
    )


def _activation(tower: dict[str, Any], quick: bool) -> str:
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu"
