"""The card of a model on the hub: README.md, written from what the model's folder holds.

A card says what the parts are, how to use them, the settings, the classes, the measured numbers
(each with its protocol and the command that gives it again, see `maskgit/card_numbers.py`), the
licence, and where the weights came from. Nothing in it is typed by hand.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from maskgit.card_numbers import FILE, Result, changed, numbers
from maskgit.checkup import PARTS, TRACE, check_folder, read_source
from maskgit.common import UserError
from maskgit.common.folder import file_hash, read_json
from maskgit.importing import SOURCE
from maskgit.metadata import to_png
from maskgit.pipeline import Pipeline
from maskgit.sheet import sheet, to_pictures

CARD, SHEET = "README.md", "samples.png"
# What is part of a model on the hub: these files of its folder, these of its parts, and numbers.
OF_FOLDER = ("model_index.json", "labels.json", "presets.json", SOURCE, TRACE)
OF_PARTS = ("config.json", "model.safetensors")
SHOWN = 8  # classes on the sheet
NAMED = 100  # classes whose names stand in the card

# By the kind of folder; the hub has no task for a tokenizer, nor for a transformer without one.
TASKS = {"pipeline": "unconditional-image-generation", "clip": "zero-shot-image-classification"}
LOADERS = {
    "vqgan": ("vqgan", "VQGAN", "tokens = model.encode(images)  # (B, 3, H, W) in [0, 1]"),
    "transformer": ("maskgit", "MaskGIT", "logits = model(tokens, labels)  # (B, N, codes)"),
    "clip": ("clip", "CLIP", "features = model.encode_image(model.preprocess(images))"),
}


@dataclass
class Model:
    """A folder that was found to be whole: its parts, and what it says of them."""

    folder: Path
    parts: dict[str, Any]  # by kind, the models
    hashes: dict[str, str]  # SHA-256 of their weights
    pipe: Pipeline | None  # if there is a tokenizer and a transformer
    source: dict[str, dict[str, str]] = field(default_factory=dict)  # of imported parts

    @property
    def labels(self) -> list[str]:
        return self.pipe.labels if self.pipe else []


def belongs(name: str) -> bool:
    """Whether a file, by its name from the folder on, is part of a model on the hub."""
    *parents, file = name.split("/")
    if file == FILE or (not parents and file in OF_FOLDER):
        return True
    return len(parents) == 1 and parents[0] in PARTS and file in OF_PARTS


def read_model(folder: Path) -> Model:
    """The model in a folder; UserError where `maskgit doctor --model` would find a problem."""
    for what, found, good in check_folder(folder):
        if not good:
            raise UserError(f"{folder} is not sent: {what}: {found}")
    kinds = [kind for kind in PARTS if (folder / kind).is_dir()]
    for kind in kinds:
        if "format_version" not in read_json(folder / kind / "config.json"):
            raise UserError(f"{folder / kind} is another project's: `maskgit import` its weights")
    hashes = {kind: file_hash(folder / kind / "model.safetensors") for kind in kinds}
    source = read_source(folder)["parts"] if (folder / SOURCE).is_file() else {}
    whole = {"vqgan", "transformer"} <= set(kinds)
    pipe = Pipeline.from_pretrained(folder, dtype="fp32") if whole else None
    parts = {kind: PARTS[kind].from_pretrained(folder / kind) for kind in kinds}
    return Model(folder, parts, hashes, pipe, source)


def licences(model: Model, given: str | None) -> dict[str, str]:
    """The licence of each part, as the hub calls it: what `source.json` says, else `given`.

    Raises UserError where nothing says it, and where the folder says it already.
    """
    texts = {kind: model.source.get(kind, {}).get("licence", "") for kind in model.parts}
    known = {kind: text.partition(" (")[0].lower() for kind, text in texts.items() if " (" in text}
    unknown = [kind for kind in model.parts if kind not in known]
    if unknown and not given:
        raise UserError(
            f"{model.folder}: nothing says the licence of {' and '.join(unknown)}, and without one "
            "nobody may use what is published: give --license ID, such as mit, apache-2.0 or "
            "cc-by-4.0"
        )
    if given and not unknown:
        said = ", ".join(sorted(set(known.values())))
        raise UserError(f"--license {given}: {SOURCE} says {said} for each part; leave it out")
    return known | dict.fromkeys(unknown, given or "")


def card(model: Model, name: str, licence: dict[str, str], results: list[Result]) -> str:
    """The text of README.md. name: "user/name", where it will be. licence: see `licences`."""
    sections = [
        front_matter(model, licence),
        f"# {name.partition('/')[2]}\n\n{summary(model)}",
        *([showcase(model.pipe, name)] if model.pipe else []),
        f"## Use\n\n{use(model, name)}",
        f"## Parts\n\n{parts_table(model)}",
        *([f"## Sampling\n\n{sampling(model.pipe, name)}"] if model.pipe else []),
        *([f"## Measured\n\n{numbers(results, name, own_settings(model))}"] if results else []),
        *([f"## Classes\n\n{classes(model.labels)}"] if model.labels else []),
        f"## Licence and source\n\n{origin(model, licence)}",
    ]
    return "\n\n".join(sections) + "\n"


def front_matter(model: Model, licence: dict[str, str]) -> str:
    """What the hub reads: licence, library, task and tags."""
    ids = sorted(set(licence.values()))
    about: dict[str, Any] = {"license": ids[0]}
    if len(ids) > 1:  # the hub takes one for all
        about = {"license": "other", "license_name": "one-for-each-part"}
        about["license_link"] = "README.md#licence-and-source"
    about["library_name"] = "maskgit"
    task = TASKS.get("pipeline" if model.pipe else "-".join(model.parts))
    if task:
        about["pipeline_tag"] = task
    about["tags"] = ["maskgit", *(kind for kind in model.parts if kind != "transformer")]
    if model.pipe:
        about["tags"] += ["image-generation", *conditional(model)]
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"


def conditional(model: Model) -> list[str]:
    return ["class-conditional-image-generation"] if model.labels else []


def summary(model: Model) -> str:
    """What there is, in one or two sentences."""
    if not model.pipe:
        names = [describe(kind, part)[0] for kind, part in model.parts.items()]
        return f"Of the package `maskgit`: {' and '.join(names)}."
    h, w = model.pipe.image_size
    of = f" of {len(model.labels):,} classes" if model.labels else ""
    steps = model.pipe.settings({})["steps"]
    more = " A CLIP that scores its images comes along." if "clip" in model.parts else ""
    return (
        "A masked generative image transformer with its tokenizer, for the package `maskgit`: "
        f"images of {h} x {w} pixels{of}, in {steps} parallel steps.{more}"
    )


def shown_classes(pipe: Pipeline) -> list[int | None]:
    """Some classes, spread over those that the model shows, or over all."""
    some = pipe.showcase or list(range(len(pipe.labels)))
    if not some:
        return [None] * SHOWN
    count = min(SHOWN, len(some))
    return [some[i * len(some) // count] for i in range(count)]


def sample_sheet(pipe: Pipeline, name: str) -> bytes:
    """A PNG of one image of each of a few classes, the first that seed 0 gives."""
    ids, settings = shown_classes(pipe), pipe.settings({})
    pictures = to_pictures(pipe.sample(ids, seed=0, batch_size=SHOWN))
    groups = [(pipe.labels[i], [p]) for i, p in zip(ids, pictures, strict=True) if i is not None]
    how = f"{settings['steps']} steps, guidance {settings['guidance']:g}, seed 0"
    picture = sheet(groups or [("no class", pictures)], f"{name.partition('/')[2]}: {how}")
    return to_png(picture, {"model": name, "labels": ids, "seed": 0, "settings": settings})


def showcase(pipe: Pipeline, name: str) -> str:
    """The sheet, and the command that makes it."""
    ids = shown_classes(pipe)
    if ids[0] is None:
        what, options = f"{len(ids)} images", ["--num", str(len(ids))]
    else:
        what = f"One image of each of {len(ids)} classes"
        options = ["--class", *(pipe.labels[i] for i in ids if i is not None), "--num", "1"]
    command = shlex.join(["maskgit", "sample", "--model", name, *options])
    command += f" --seed 0 --dtype fp32 --out {SHEET}"
    return f"![Samples]({SHEET})\n\n{what}, not selected:\n\n{block(command)}"


def use(model: Model, name: str) -> str:
    """Commands and Python that take the model from the hub."""
    if model.pipe:
        first = [None if i is None else model.labels[i] for i in shown_classes(model.pipe)[:1]]
        option = shlex.join(["--class", *map(str, first)]) + " " if model.labels else ""
        h, w = model.pipe.image_size
        command = f"maskgit sample --model {name} {option}--num 4 --out images.png"
        python = [
            "from maskgit import Pipeline",
            "",
            f'pipe = Pipeline.from_pretrained("{name}")',
            f"images = pipe.sample({first}, seed=0)  # (1, 3, {h}, {w}) in [0, 1]",
        ]
        return f"{block(command)}\n\n{block(*python, language='python')}"
    return "\n\n".join(
        block(
            f"from {LOADERS[kind][0]} import {LOADERS[kind][1]}",
            "",
            f'model = {LOADERS[kind][1]}.from_pretrained("{name}")',
            LOADERS[kind][2],
            language="python",
        )
        for kind in model.parts
    )


def parts_table(model: Model) -> str:
    """Each part: what it is, how large, and the hash of its weights."""
    rows = ["| Folder | What | Weights | SHA-256 |", "|---|---|---|---|"]
    for kind, part in model.parts.items():
        what, details = describe(kind, part)
        count = sum(parameter.numel() for parameter in part.parameters()) / 1e6
        digest = f"`{model.hashes[kind][:16]}...`"
        rows.append(f"| `{kind}/` | {what}: {details} | {count:.1f} million | {digest} |")
    return "\n".join(rows)


def describe(kind: str, part: Any) -> tuple[str, str]:
    """What a part is called, and its shape, from its config."""
    config = part.config
    if kind == "vqgan":
        return "tokenizer", f"{config.codebook_size:,} codes, {config.factor} pixels a token"
    if kind == "transformer":
        grid, labels = " x ".join(map(str, config.grid)), f"{config.num_classes:,} classes"
        of = f"{grid} tokens, {labels if config.num_classes else 'no classes'}"
        shape = f"width {config.width}, depth {config.depth}, {config.heads} heads"
        guided = "guidance can be used" if config.null_label is not None else "without guidance"
        return "transformer", f"{of}, {shape}, {config.architecture} architecture, {guided}"
    size, image = " x ".join(map(str, config.image.size)), config.image
    tower = f"{image.tower} {image.name}".strip()
    details = f"images of {size} ({tower}), texts of {config.text.context} tokens"
    return "CLIP", details + (f", recipe {config.recipe}" if config.recipe else "")


def own_settings(model: Model) -> dict[str, Any]:
    return model.pipe.settings({}) if model.pipe else {}


def sampling(pipe: Pipeline, name: str) -> str:
    """The settings that it samples by, and the presets with what others reached by them."""
    lines = [f"By default: {spell(pipe.settings({}))}."]
    for preset, about in pipe.presets.items():
        settings = changed(pipe.settings({"preset": preset}), pipe.settings({}))
        how = spell(settings) if settings else "the same settings"
        lines.append(f"`maskgit sample --model {name} --preset {preset}`: {how}.")
        if about.get("reached"):
            lines[-1] += f" Reached elsewhere, not measured here: {about['reached']}."
        if about.get("note"):
            lines[-1] += f" Note: {about['note']}."
    return "\n\n".join(lines)


def spell(settings: dict[str, Any]) -> str:
    """Settings in words, without those that are off."""
    on = {key: value for key, value in settings.items() if value}
    if not settings.get("guidance", 1):
        on.pop("guidance_schedule", None)
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in on.items())


def classes(labels: list[str]) -> str:
    """How many there are and what the first are called."""
    if labels == [str(i) for i in range(len(labels))]:
        return f"{len(labels):,}, which have numbers and no names."
    rest = f", and {len(labels) - NAMED:,} more in `labels.json`" if len(labels) > NAMED else ""
    return f"{len(labels):,}: {', '.join(labels[:NAMED])}{rest}."


def origin(model: Model, licence: dict[str, str]) -> str:
    """The licence of each part, and the file that it was imported from."""

    def lines() -> Iterator[str]:
        for kind in model.parts:
            about = model.source.get(kind)
            text = "trained with `maskgit`, on data that its folder does not name"
            if about:
                text = f"{about['family']}, imported from `{about['file']}`, sha256 "
                text += f"`{about['sha256']}`, licence there: {about['licence']}"
            yield f"- `{kind}/`: {licence[kind]}; {text}"

    return "\n".join(lines())


def block(*lines: str, language: str = "sh") -> str:
    return "\n".join([f"```{language}", *lines, "```"])
