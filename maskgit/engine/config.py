"""YAML and `key=value` overrides, merged into the dataclasses that the code uses."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from maskgit.common import UserError, nearest


def read_yaml(source: str | Path, folders: Sequence[Path]) -> dict[str, Any]:
    """A config by path, or by name ("emoji_vqgan") from the first of `folders` that has it."""
    path = Path(source)
    for folder in folders if not path.is_file() else []:
        named = folder / f"{source}.yaml"
        if named.is_file():
            path = named
            break
    if not path.is_file():
        known = sorted(p.stem for folder in folders for p in folder.glob("*.yaml"))
        hint = nearest(str(source), known)
        raise UserError(f"no config {source}: neither a file nor a name; {hint}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a config: it holds no keys")
    return content


def parse_overrides(arguments: Sequence[str]) -> DictConfig:
    """`key=value` words as a config; values are YAML ("true", "[1, 2]", "1e-3")."""
    for word in arguments:
        if "=" not in word or word.startswith("="):
            raise UserError(f"{word!r} is no setting: write key=value, such as train.steps=100")
    try:
        return OmegaConf.from_dotlist(list(arguments))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"cannot read the settings: {_first_line(error)}") from None


def merge(schema: type, *layers: Mapping[str, Any] | DictConfig) -> DictConfig:
    """The schema's defaults under `layers`, later ones winning.

    A key that the schema lacks, or a value of another type, is a UserError naming the nearest key.
    """
    merged = OmegaConf.structured(schema)
    for layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except ConfigKeyError as error:
            key = str(error.full_key or error.key)
            known = _keys(schema)
            raise UserError(f"the config has no key {key!r}: {nearest(key, known)}") from None
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "the config"
            raise UserError(f"{key}: {_first_line(error)}") from None
    return merged


def build(merged: DictConfig) -> Any:
    """The dataclass instance of a merged config."""
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _keys(schema: Any, prefix: str = "") -> list[str]:
    """All keys of a dataclass and of those inside it, dotted."""
    keys = []
    for f in dataclasses.fields(schema):
        keys.append(prefix + f.name)
        inner = f.type if isinstance(f.type, type) else None
        if inner and dataclasses.is_dataclass(inner):
            keys += _keys(inner, f"{prefix}{f.name}.")
    return keys


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Where two nested plain configs differ, one line a field: "train.lr: 0.001, now 0.002"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        parts = [differences(old.get(k), new.get(k), f"{prefix}{k}.") for k in keys]
        return [line for part in parts for line in part]
    return [] if old == new else [f"{prefix[:-1]}: {old}, now {new}"]
