"""What `maskgit evaluate clip` is given, all of it found and checked before anything is encoded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip.texts import Texts, check_templates, spoken
from clip.zero_shot import imagenet, templates
from maskgit.common import UserError, nearest, pick
from maskgit.common.folder import read_text
from maskgit.engine.captions import captions_of
from maskgit.engine.sources import BUNDLED_SHARDS
from maskgit.evaluation.clip_score import Pictures, open_pictures
from maskgit.evaluation.prompts import class_texts, described

TASKS = {
    "zero-shot": "classes from texts alone",
    "retrieval": "images and captions found by each other",
    "probe": "classes from a linear classifier of the features",
    "few-shot": "the same from few images a class, against zero-shot",
}
ONE = "a photo of a {}."  # the template shown beside an ensemble of those that come with the code
TRAINED_ON = {"emoji:heldout": "emoji"}  # what a probe of a bundled set is fitted on


class Way(NamedTuple):
    """One way to make prompts: each name of each class, in each template."""

    names: Sequence[Texts]
    templates: list[str]


@dataclass(eq=False)
class Inputs:
    """Everything that the tasks need, and why those left out lack something."""

    tasks: list[str]
    left_out: dict[str, str]
    data: Pictures
    train: Pictures | None  # its labels are numbers of the classes of `data`
    train_labels: Tensor | None  # (M,) int64
    names: Sequence[Texts]  # of the classes of `data`, as they stand in prompts; [] without classes
    ways: dict[str, Way]  # to make prompts, the fullest last
    captions: list[list[str]] = field(default_factory=list)  # of each image, for retrieval

    @property
    def needs_prompts(self) -> bool:
        """Whether classes are named by texts: few shots are measured against none, too."""
        return bool({"zero-shot", "few-shot"} & set(self.tasks))

    @property
    def labels(self) -> Tensor:
        """(N,) int64, the class of each image of `data`."""
        return torch.tensor([item.label for item in self.data.items])


def choose_tasks(asked: Sequence[str] | None) -> list[str]:
    """The tasks asked for, in the order of `TASKS`; all for None. UserError for an unknown one."""
    for name in asked or ():
        pick(TASKS, name, "task")
    return [name for name in TASKS if asked is None or name in asked]


def resolve(
    data: str,
    train: str | None = None,
    tasks: Sequence[str] | None = None,
    names: str | None = None,
    prompts: str | None = None,
    captions: Path | None = None,
) -> Inputs:
    """Open the sets and read the files; names and prompts: as `read_names` and `read_templates`
    take them. Raises UserError for what is wrong, and for what a task that was asked for lacks; of
    tasks that were not named, those that lack something are left out."""
    chosen = choose_tasks(tasks)
    lacking: dict[str, str] = {}
    read = read_templates(prompts)
    listed = read_list(names) if names and names != "imagenet" else None
    train = train or TRAINED_ON.get(data)
    if train is None:
        lacking |= dict.fromkeys(("probe", "few-shot"), "no images to fit it on: give --train SET")
    elif train == data:
        raise UserError(f"--train {train} is what is measured: give other images of these classes")
    _refuse(tasks, lacking)
    found = open_pictures(data, [captions] if captions else [])
    if not found.classes:
        reason = f"{data} has no classes: one folder each, or a class in each sample of the shards"
        lacking = dict.fromkeys(("zero-shot", "probe", "few-shot"), reason) | lacking
        if names:
            raise UserError(f"--names {names}: {reason}")
    texts: list[list[str]] = []
    if "retrieval" in chosen:
        try:
            texts = _captions(found, captions)
        except UserError as error:
            if captions:
                raise
            lacking["retrieval"] = str(error)
    _refuse(tasks, lacking)
    named = name_classes(found.classes, names, listed, data) if found.classes else []
    ways = ways_to_prompt(found.classes, named, read, prompts)
    chosen = [name for name in chosen if name not in lacking]
    if not chosen:
        raise UserError(f"{data} has neither classes nor captions: there is nothing to measure")
    other, labels = None, None
    if train is not None and {"probe", "few-shot"} & set(chosen):
        other = open_pictures(train)
        labels = match_labels(other, found)
        if other.describe()["hash"] == found.describe()["hash"]:
            raise UserError(f"--train {train} has the very images of {data}: give others")
    left = {name: why for name, why in lacking.items() if tasks is None}
    return Inputs(chosen, left, found, other, labels, named, ways, texts)


def _refuse(tasks: Sequence[str] | None, lacking: dict[str, str]) -> None:
    for name in tasks or ():
        if name in lacking:
            raise UserError(f"--task {name}: {lacking[name]}")


def _captions(pictures: Pictures, table: Path | None) -> list[list[str]]:
    """Of a bundled set the names alone: its keywords fit many drawings, and so find none."""
    texts = captions_of(pictures.items, table)
    bundled = table is None and pictures.name in BUNDLED_SHARDS
    return [own[:1] for own in texts] if bundled else texts


def read_list(source: str) -> list[Any] | dict[str, Any]:
    """Texts from a file: a JSON list, a JSON object (class -> text), or else one a line. In JSON an
    entry may be a list of texts.

    Raises UserError for a file that is missing, no text or empty, and for an empty text.
    """
    path, text = Path(source), read_text(source)
    found: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"{source} is not JSON ({error})") from None
    texts = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(texts, list) or not texts:
        raise UserError(f"{source} holds no texts: a JSON list or object, or one text a line")
    each = [one if isinstance(one, list) and one else [one] for one in texts]
    if not all(isinstance(one, str) and one.strip() for own in each for one in own):
        raise UserError(f"{source} has an entry that is empty or no text: all must be texts")
    return found


def name_classes(
    classes: Sequence[str],
    source: str | None,
    listed: list[Texts] | dict[str, Texts] | None,
    where: str,
) -> list[Texts]:
    """The name of each class in prompts, or several: as `listed` (from the file `source`) has them,
    ImageNet's for the source "imagenet", else as `class_texts` has them.

    Raises UserError for other numbers of names than classes, and for unknown and missing classes.
    """
    if listed is None and source is None:
        return class_texts(classes)
    names = imagenet()["names"] if listed is None else listed
    if isinstance(names, dict):
        for name in names:
            if name not in classes:
                hint = nearest(name, classes)
                raise UserError(f"{source} names a class {name!r} that {where} has not: {hint}")
        if missing := [name for name in classes if name not in names]:
            raise UserError(f"{source} has no name for {len(missing)} classes ({missing[0]}, ...)")
        return [names[name] for name in classes]
    if len(names) != len(classes):
        raise UserError(
            f"{source} has {len(names)} names, {where} {len(classes)} classes: give one for each, "
            "in the order of the classes, or a JSON object from class to name"
        )
    return list(names)


def read_templates(source: str | None) -> list[str]:
    """Prompt templates by name (imagenet, imagenet7; the latter for None), or from a file.

    Raises UserError for a missing file and for a template without {}.
    """
    known = imagenet()["templates"]
    if source is None or source in known:
        return templates(source or "imagenet7")
    if not Path(source).expanduser().is_file():
        raise UserError(f"no templates {source}: give a file, or {' or '.join(known)}")
    found = read_list(source)
    if isinstance(found, dict) or not all(isinstance(one, str) for one in found):
        raise UserError(f"{source} is no list of texts: templates are a JSON list, or one a line")
    check_templates(found, source)
    return found


def ways_to_prompt(
    classes: Sequence[str], names: Sequence[Texts], found: list[str], source: str | None
) -> dict[str, Way]:
    """The ways to make prompts, without those that equal one before: bare names, one template (of a
    file the first), and all of them as an ensemble. For the bundled classes, whose drawings are no
    photos, without templates of their own: the names of the classes, and what `names` says."""
    own = source is not None and source not in imagenet()["templates"]
    plain = [spoken(name) for name in classes]
    if set(classes) == described().keys() and not own:
        return {"class name": Way(plain, ["{}"]), "described": Way(names, ["{}"])}
    options = {"bare name": ["{}"], "one template": [found[0] if own else ONE], "ensemble": found}
    ways: dict[str, Way] = {}
    for way, texts in options.items():
        if all(texts != other.templates for other in ways.values()):
            ways[way] = Way(names, texts)
    return ways


def match_labels(train: Pictures, data: Pictures) -> Tensor:
    """(M,) int64, the class of each image of `train`, by its number in `data`. Raises UserError for
    a class that `data` does not have, and where there are none at all."""
    if not train.classes:
        raise UserError(f"--train {train.name} has no classes: one folder each, as {data.name}")
    number = {name: i for i, name in enumerate(data.classes)}
    for name in train.classes:
        if name not in number:
            raise UserError(
                f"--train {train.name} has a class {name!r}, {data.name} does not: "
                f"{nearest(name, data.classes)}"
            )
    return torch.tensor([number[train.classes[item.label]] for item in train.items])
