"""Settings by which others reached their published numbers, as they stand in a model's folder.

`presets.json` there holds {name: {"settings": what `Pipeline.sample` takes, "reached": what came of
them and who says so, "note": what was converted, and what differs}}.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskgit.common import UserError, pick
from maskgit.common.folder import read_json

Preset = dict[str, Any]

OFFICIAL, HALTON = "official MaskGIT", "Halton-MaskGIT"  # families, see `maskgit.weights`
# The decoding of each, before what depends on the model.
PRESETS: dict[str, Preset] = {
    "maskgit": {
        "steps": 8,
        "schedule": "cosine",
        "order": "confidence",
        "temperature": 1.0,
        "choice_temperature": 4.5,
        "guidance": 0.0,
    },
    "halton": {
        "steps": 32,
        "schedule": "halton",
        "order": "halton",
        "temperature": 1.0,
        "guidance": 1.0,
        "guidance_schedule": "constant",
    },
}
# By family and side of the grid in tokens: what differs from PRESETS; FID and Inception Score.
REACHED: dict[tuple[str, int], tuple[Preset, float, float]] = {
    (OFFICIAL, 16): ({}, 6.18, 182.1),
    (OFFICIAL, 32): ({"steps": 12}, 7.32, 156.0),
    (f"{HALTON} tiny", 16): ({"guidance": 1.5}, 10.2, 185),
    (f"{HALTON} small", 16): ({"guidance": 1.0}, 6.40, 255),
    (f"{HALTON} base", 16): ({"guidance": 0.7}, 4.17, 263),
    (f"{HALTON} small", 24): ({"guidance": 1.0}, 6.11, 241),
    (f"{HALTON} base", 24): ({"guidance": 0.7}, 4.15, 257),
    (f"{HALTON} large", 24): ({"guidance": 0.5}, 2.59, 281),
}
SOURCES = {
    "maskgit": "Chang et al. 2022, table 1; the README of the released code has FID 6.06 at 256",
    "halton": "README of Halton-MaskGIT; clean-fid's resizing, statistics of the training set",
}
NOTES = {
    "maskgit": (
        "no guidance: this model has no label for no class; from a blank image as many tokens are "
        "settled at each step as in the released code, which in a hole of a few tokens keeps at "
        "least one masked up to the last step, where here all of them may be settled before"
    ),
    "halton": (
        "published as w = {guidance:g} in (1 + w) cond - w uncond, which is cond + guidance (cond "
        "- uncond) with guidance = w; --order halton-rolled begins the order elsewhere for each "
        "image; what is known stays and does not count, unlike in the released code"
    ),
}


def presets_for(family: str, grid: Sequence[int]) -> dict[str, Preset]:
    """What `presets.json` is to hold for a model that `maskgit.weights.published` read.

    family: as it calls it, such as "Halton-MaskGIT base". grid: (h, w) in tokens. A size that
    nobody published numbers of has the family's settings; another family has none.
    """
    if not family.startswith((OFFICIAL, HALTON)):
        return {}
    name = "maskgit" if family == OFFICIAL else "halton"
    side = grid[0] if grid[0] == grid[1] else 0
    settings, reached = PRESETS[name], "no numbers were published for this size"
    if (family, side) in REACHED:
        changes, fid, score = REACHED[family, side]
        settings = settings | changes
        reached = f"FID {fid:g}, Inception Score {score:g} ({SOURCES[name]})"
    note = NOTES[name].format(**settings)
    return {name: {"settings": dict(settings), "reached": reached, "note": note}}


def read_presets(path: Path) -> dict[str, Preset]:
    """The presets of a model's folder, none where it has no such file; UserError for a file that
    holds something else."""
    if not path.is_file():
        return {}
    presets = read_json(path)
    if not isinstance(presets, dict) or not all(
        isinstance(preset, dict) and isinstance(preset.get("settings"), dict)
        for preset in presets.values()
    ):
        raise UserError(f'{path} is no table of presets, {{name: {{"settings": {{...}}, ...}}}}')
    return presets


def pick_preset(presets: Mapping[str, Preset], name: str) -> Preset:
    """The preset of that name; UserError, with the nearest names, where there is none."""
    if not presets:
        raise UserError(f"preset {name!r}: this model has none (no presets.json in its folder)")
    return pick(presets, name, "preset")
