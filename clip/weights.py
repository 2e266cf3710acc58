"""CLIPs from disk: our own folders, and the files and folders that others publish.

Nothing in a file is executed. What the weights do not tell, their recipe, comes from the folder, or
from the table of known files (`clip/recipes.py`), or is asked for by name: with other heads, or
another activation, a model loads all the same and its features are wrong.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip.config import CLIPConfig, ImageConfig, TextConfig
from clip.huggingface import huggingface_config
from clip.layouts import claims, contradiction, measure, to_native
from clip.model import CLIP
from clip.openclip import openclip_config
from clip.recipes import recipe_config, recipes
from maskgit.common import UserError, nearest
from maskgit.common.folder import (
    file_hash,
    find,
    load_module,
    load_state,
    load_weights,
    read_json,
)
from maskgit.common.hub import failures, hub_id, hub_reason
from maskgit.common.pickles import Record, flatten, read_torch

# What a published folder has: its config and the weights beside it, the first that is there.
OPENCLIP = ("open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
HUGGINGFACE = ("config.json", ("model.safetensors", "pytorch_model.bin"))
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".npz", ".ckpt")
WANTED = (
    "config.json, preprocessor_config.json and model.safetensors (or pytorch_model.bin), or "
    "open_clip_config.json and open_clip_pytorch_model.bin (or open_clip_model.safetensors)"
)


def load_clip(source: str | Path, revision: str | None = None, recipe: str | None = None) -> CLIP:
    """A CLIP in fp32 and eval mode.

    `source` is our own folder (or one with a `clip` in it), a bundled name ("emoji"), a folder or
    hub id of OpenCLIP's or Hugging Face's, a file that they or OpenAI published, or the name of a
    recipe that the hub has. `recipe`, such as "ViT-B-32/openai", is for bare weights; it goes
    before what the table and a config beside the file say. Raises UserError where there is no such
    model, where the recipe is open, and where it contradicts the tensors.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_file():
        return _load_file(path, recipe)
    if name in recipes() and not path.is_dir():
        if not recipes()[name].hub:
            raise UserError(
                f"{name} is not on the hub: fetch its file, {recipes()[name].file}, elsewhere and "
                "pass the path of that"
            )
        name, recipe = recipes()[name].hub, recipe or name
    folder = _find(name, revision)
    folder = folder / "clip" if (folder / "clip").is_dir() else folder
    if _is_own(folder):
        return _load_own(folder, recipe)
    for config, files in (OPENCLIP, HUGGINGFACE):
        found = [folder / file for file in files if (folder / file).is_file()]
        if found and (folder / config).is_file():
            return _load_file(found[0], recipe)
    there = ", ".join(sorted(file.name for file in folder.iterdir())[:4]) or "nothing"
    raise UserError(f"{folder} holds no CLIP: it takes {WANTED} (it has {there})")


def _is_own(folder: Path) -> bool:
    path = folder / "config.json"
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and "format_version" in content


def _load_own(folder: Path, recipe: str | None) -> CLIP:
    if recipe is not None:
        raise UserError(f"{folder} has its recipe in config.json: leave recipe={recipe} out")
    return load_module(folder, CLIP, CLIPConfig)


def _find(name: str, revision: str | None) -> Path:
    """The folder of `name`. From the hub, with a .bin where there are no safetensors."""
    if Path(name).suffix in SUFFIXES:
        raise UserError(f"there is no file {name}: give its path as it is seen from here")
    hub = None if Path(name).expanduser().is_dir() else hub_id(name, revision)
    try:
        folder = find(name, revision)
    except UserError as error:
        if not hub:
            raise
        reason = str(error).partition("(")[2].partition("): fetch")[0]
        hint = nearest(name, recipes())
        raise UserError(
            f"no folder {name} here, and the hub did not give it ({reason or error}): put {WANTED} "
            f"of {name} into one folder and pass its path"
            + (f"; of recipes: {hint}" if hint.startswith("did") else "")
        ) from None
    weights = any(
        (folder / file).is_file() for _, files in (OPENCLIP, HUGGINGFACE) for file in files
    )
    if hub and not weights and not (folder / "clip").is_dir():
        from huggingface_hub import hf_hub_download

        config, files = OPENCLIP if (folder / OPENCLIP[0]).is_file() else HUGGINGFACE
        try:
            hf_hub_download(hub[0], files[-1], revision=hub[1])
        except failures() as error:
            raise UserError(
                f"{name} on the hub gave {config}, and not {files[-1]} ({hub_reason(error)}): put "
                "both into one folder and pass its path"
            ) from None
    return folder


def _load_file(path: Path, recipe: str | None) -> CLIP:
    if path.name == "model.safetensors" and _is_own(path.parent):
        return _load_own(path.parent, recipe)
    tensors, scripted = _read(path)
    state = to_native(tensors)
    found = measure(state, path)
    if recipe is not None:
        config = recipe_config(recipe)
    else:
        config = _beside(path) or _known(path, found, scripted)
    wrong = contradiction(config, found)
    if wrong:
        raise UserError(f"{path} contradicts its recipe, {config.recipe}: by that, {wrong}")
    return _build(config, state, path)


def _read(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file, and whether it is a TorchScript archive."""
    if path.suffix == ".safetensors":
        return load_state(path), False
    content = read_torch(path)
    if isinstance(content, Record):
        return flatten(content), True
    for key in ("state_dict", "model_state_dict", "model"):  # of a training checkpoint
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not the tensors of a model")
    return flatten(content), False


def _beside(path: Path) -> CLIPConfig | None:
    """What the config in a published folder says of its weights."""
    for (config, files), read in ((OPENCLIP, openclip_config), (HUGGINGFACE, huggingface_config)):
        if path.name in files and (path.parent / config).is_file():
            return read(path.parent)
    return None


def _known(path: Path, found: Mapping[str, Any], scripted: bool) -> CLIPConfig:
    """The recipe of a file on its own: OpenAI's of a TorchScript archive, else by hash or, where
    the hash is not known, by name; and the shapes have to fit."""
    fits = [name for name, r in recipes().items() if not contradiction(r.config, found)]
    if scripted:
        name = next((name for name in fits if name.endswith("/openai")), None)
        config = recipe_config(name) if name else None if fits else _openai(found)
        if config:
            return config
    hashes = {name: recipes()[name].sha256 for name in fits if recipes()[name].sha256}
    digest = file_hash(path) if hashes else ""
    for name in fits:
        if digest.startswith(hashes[name]) if name in hashes else recipes()[name].file == path.name:
            return recipe_config(name)
    alike = {name: len(_agreed(r.config, found)) for name, r in recipes().items()}
    nearest_names = fits or sorted(alike, key=lambda name: -alike[name])[:3]
    listed = ", ".join(nearest_names[:6]) + (", ..." if len(nearest_names) > 6 else "")
    raise UserError(
        f"{path}: bare weights leave heads, activation, mean, std and resize open: give the recipe "
        f"that they were trained by, recipe=NAME or {path.name}@NAME to a command "
        f"({'these fit' if fits else 'none fits, nearest'}: {listed}), or put {OPENCLIP[0]} beside "
        f"{OPENCLIP[1][1]}"
    )


def _agreed(config: CLIPConfig, found: Mapping[str, Any]) -> list[str]:
    return [name for name, claimed in claims(config).items() if claimed == found.get(name)]


def _openai(found: Mapping[str, Any]) -> CLIPConfig | None:
    """A model of OpenAI's design by its shapes: heads of 64 channels, QuickGELU; None if it is of
    another design."""
    side, width = math.isqrt(found.get("image positions", 0)), found["text.width"]
    design = found.get("image.pool", "class"), found["text.bias"], found["loss"]
    if design != ("class", False, "infonce") or side**2 != found.get("image positions"):
        return None
    if width % 64 or (found["image.tower"] == "vit" and found["image.width"] % 64):
        return None
    image = {"activation": "quick_gelu", "width": found["image.width"]}
    if found["image.tower"] == "vit":
        patch = found["image.patch"]
        image |= {"size": [side * patch] * 2, "patch": patch, "heads": image["width"] // 64}
        image |= {"depth": found["image.depth"], "hidden": found["image.hidden"]}
    else:
        image |= {"tower": "resnet", "size": [32 * side] * 2, "blocks": found["image.blocks"]}
        image["heads"] = image["width"] // 2
    rows = found["text.vocabulary"]
    ids = {} if rows == TextConfig().rows else {"merges": None, "vocabulary": rows}
    text = TextConfig(
        context=found["text.context"],
        width=width,
        depth=found["text.depth"],
        heads=width // 64,
        hidden=found["text.hidden"],
        activation="quick_gelu",
        **ids,
    )
    return CLIPConfig(found["embed"], ImageConfig(**image), text, recipe="openai")


def _build(config: CLIPConfig, state: dict[str, Tensor], where: Path) -> CLIP:
    if config.image.tower == "timm":
        model = CLIP(config)  # timm computes some tensors that no file has
    else:
        with torch.device("meta"):  # no memory and no time for first values
            model = CLIP(config)
        model.to_empty(device="cpu")
    for name, own in model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # which only training needs
            state.setdefault(name, torch.zeros_like(own))
    load_weights(model, state, where)
    return model.eval()
