"""Whose names the tensors of a file carry, and what their shapes tell.

Ours are OpenAI's with the text tower under `text.`, and with the two projections as linear layers,
whose weights lie the other way round. OpenCLIP has both places for the text tower, and timm's names
in image towers of timm.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clip.config import CLIPConfig
from maskgit.common import UserError

DROPPED = {"input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask"}
TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")

# Parts of a name, replaced one after the other: theirs, ours.
TIMM = (  # SigLIP's image tower
    ("visual.trunk.patch_embed.proj.", "visual.conv1."),
    ("visual.trunk.pos_embed", "visual.positional_embedding"),
    ("visual.trunk.norm.", "visual.ln_post."),
    ("visual.trunk.blocks.", "visual.transformer.resblocks."),
    ("visual.trunk.attn_pool.", "visual.attn_pool."),
    (".latent", ".probe"),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.", ".attn.in_proj_"),
    (".attn.proj.", ".attn.out_proj."),
    (".attn_pool.proj.", ".attn_pool.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
HUGGINGFACE = (
    ("text_model.", "text."),
    ("vision_model.", "visual."),
    (".embeddings.token_embedding.", ".token_embedding."),
    (".embeddings.position_embedding.weight", ".positional_embedding"),
    (".embeddings.class_embedding", ".class_embedding"),
    (".embeddings.patch_embedding.", ".conv1."),
    (".pre_layrnorm.", ".ln_pre."),  # so spelt
    (".post_layernorm.", ".ln_post."),
    (".final_layer_norm.", ".ln_final."),
    (".encoder.layers.", ".transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.", ".attn."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    ("visual.head.attention.", "visual.attn_pool."),
    ("visual.head.probe", "visual.attn_pool.probe"),
    ("visual.head.layernorm.", "visual.attn_pool.norm."),
    ("visual.head.mlp.", "visual.attn_pool.mlp."),
    ("visual_projection.", "visual.proj."),
)
HEAD = ("text.head.", "text.text_projection.")  # SigLIP's; CLIP's is `text_projection`


def rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in pairs:
        name = name.replace(theirs, ours)
    return name


def to_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under OpenAI's, OpenCLIP's, timm's or Hugging Face's names -> under ours.

    What the towers compute is not changed, so this needs no recipe.
    """
    state = dict(state)
    for prefix in ("module.", "_orig_mod."):  # of parallel and of compiled training
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    state = {
        name: tensor
        for name, tensor in state.items()
        if name not in DROPPED and not name.endswith("position_ids")
    }
    if any(name.startswith(("text_model.", "vision_model.")) for name in state):
        renames = (*HUGGINGFACE, HEAD)
        state = _joined({rename(name, renames): tensor for name, tensor in state.items()})
    state = {f"text.{n}" if n.startswith(TEXT) else n: tensor for n, tensor in state.items()}
    for parameter in ("visual.proj", "text.text_projection"):
        if parameter in state:
            state[f"{parameter}.weight"] = state.pop(parameter).T
    attention = "visual.trunk.attn_pool.latent" in state and "visual.trunk.cls_token" not in state
    if attention and not any(name.startswith("visual.head.") for name in state):
        state = {rename(name, TIMM): tensor for name, tensor in state.items()}
        for kind in ("weight", "bias"):
            both = [state.pop(f"visual.attn_pool.{name}.{kind}") for name in ("q", "kv")]
            state[f"visual.attn_pool.in_proj_{kind}"] = torch.cat(both)
        state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
    if "visual.attn_pool.probe" in state:
        state["visual.attn_pool.probe"] = state["visual.attn_pool.probe"].flatten()
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state:
            state[scalar] = state[scalar].reshape(())
    return state


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value projections of self-attention as one."""
    for name in [name for name in state if ".attn.q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return state


def measure(state: Mapping[str, Tensor], where: Any) -> dict[str, Any]:
    """What the shapes of tensors under our names tell of the config: values by the names of its
    fields. UserError where they are no CLIP's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        found = {"embed": shapes["text.text_projection.weight"][0], **_image(shapes)}
        rows, width = shapes["text.token_embedding.weight"]
        found |= {
            "text.vocabulary": rows,
            "text.width": width,
            "text.context": shapes["text.positional_embedding"][0],
            **_blocks("text", shapes),
            "text.bias": "text.text_projection.bias" in shapes,
        }
    except (KeyError, IndexError, ValueError) as error:
        first = ", ".join(list(state)[:3]) or "none"
        raise UserError(
            f"{where} holds no CLIP that is known here: {error} is missing (it has {first}, ...)"
        ) from None
    return found | {"loss": "sigmoid" if "logit_bias" in shapes else "infonce"}


def _image(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    if any(name.startswith("visual.trunk.") for name in shapes):
        return {"image.tower": "timm"}
    if "visual.layer1.0.conv1.weight" in shapes:
        levels = [
            {n.split(".")[2] for n in shapes if f"visual.layer{i}." in n} for i in range(1, 5)
        ]
        return {
            "image.tower": "resnet",
            "image.width": shapes["visual.layer1.0.conv1.weight"][0],
            "image.blocks": [len(level) for level in levels],
            "image positions": shapes["visual.attnpool.positional_embedding"][0] - 1,
        }
    pool = "class" if "visual.ln_pre.weight" in shapes else "mean"
    if "visual.attn_pool.probe" in shapes:
        pool = "attention"
    width, _, _, patch = shapes["visual.conv1.weight"]
    rows = shapes["visual.positional_embedding"][0]
    return {
        "image.tower": "vit",
        "image.width": width,
        "image.patch": patch,
        **_blocks("image", shapes),
        "image.pool": pool,
        "image positions": rows - (pool != "attention"),
    }


def _blocks(tower: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    blocks = f"{'visual' if tower == 'image' else 'text'}.transformer.resblocks."
    depth = len({name.split(".")[3] for name in shapes if name.startswith(blocks)})
    return {f"{tower}.depth": depth, f"{tower}.hidden": shapes[f"{blocks}0.mlp.c_fc.weight"][0]}


def claims(config: CLIPConfig) -> dict[str, Any]:
    """What `measure` would find in the tensors of a model of this config."""
    image, text = config.image, config.text
    of_image: dict[str, Any] = {"image.tower": image.tower}
    if image.tower == "resnet":
        of_image |= {"image.width": image.width, "image.blocks": image.blocks}
    elif image.tower == "vit":
        of_image |= {
            "image.width": image.width,
            "image.patch": image.patch,
            "image.depth": image.depth,
            "image.hidden": image.hidden or 4 * image.width,
            "image.pool": image.pool,
        }
    if image.tower != "timm":
        of_image["image positions"] = math.prod(image.grid)
    return {
        "embed": config.embed,
        **of_image,
        "text.vocabulary": text.rows,
        "text.width": text.width,
        "text.context": text.context,
        "text.depth": text.depth,
        "text.hidden": text.hidden or 4 * text.width,
        "text.bias": text.bias,
        "loss": config.loss,
    }


def contradiction(config: CLIPConfig, found: Mapping[str, Any]) -> str | None:
    """The first thing that a config says and the tensors of a file do not; or None."""
    for name, claimed in claims(config).items():
        if claimed != found.get(name):
            return f"{name} is {claimed}, and by its tensors {found.get(name)}"
    return None
