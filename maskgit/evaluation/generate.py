"""Draws the images of an evaluation: each by its own seed, resumable, shared between processes.

Image i is the file `000123.png` of a folder, whoever draws it and whenever: a file is written
whole and then named, and what has its name is kept. So a run that was killed goes on, and any
number of processes makes the same set.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from maskgit.common import UserError
from maskgit.common.folder import free_space, read_json, write_json, write_whole
from maskgit.common.progress import Advance, meter
from maskgit.engine.config import differences
from maskgit.evaluation.protocol import apportion
from maskgit.evaluation.sets import PixelSet
from maskgit.metadata import to_png
from maskgit.pipeline import Pipeline
from maskgit.request import label_ids
from maskgit.sheet import to_pictures


def choose_labels(
    policy: str, count: int, names: Sequence[str], reference: Sequence[int | None], seed: int
) -> list[int | None]:
    """The class of each of `count` images, by the policy of `--labels`.

    balanced: the same number of each, classes taking turns. random: drawn uniformly. reference:
    with the frequencies of the reference's own labels. Else a file: one name or number a line.
    Raises UserError for what cannot be had.
    """
    classes = len(names)
    if not classes:
        if policy not in ("balanced", "random"):
            raise UserError(f"--labels {policy}: this model has no classes; leave it out")
        return [None] * count
    if policy == "balanced":
        return [i % classes for i in range(count)]
    if policy == "random":
        return np.random.default_rng([seed, 0]).integers(classes, size=count).tolist()
    if policy == "reference":
        known = [label for label in reference if label is not None and label >= 0]
        if not known or max(known) >= classes:
            raise UserError(f"--labels reference: the reference has no labels of {classes} classes")
        counts = apportion(count, np.bincount(known, minlength=classes).tolist())
        return [label for label in range(classes) for _ in range(counts[label])]
    try:
        lines = Path(policy).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        choices = "balanced, random, reference"
        raise UserError(f"--labels {policy}: neither {choices} nor a text file") from None
    if len(lines) != count:
        raise UserError(f"--labels {policy}: {len(lines)} lines for {count} images")
    return label_ids([line.strip() for line in lines], names)


def reference_labels(images: PixelSet, names: Sequence[str]) -> list[int | None]:
    """The labels of a reference as a model with classes `names` counts them: by name, where the
    reference has any; an .npz file has numbers alone. UserError for a class that is not known."""
    if images.kind == "npz":
        return images.labels
    if unknown := sorted(set(images.classes) - set(names)):
        raise UserError(f"--labels reference: the model has no class {unknown[0]!r}")
    number = [names.index(name) for name in images.classes]
    return [None if label is None else number[label] for label in images.labels]


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write what the images of `folder` are drawn by; UserError if others were begun there."""
    file = folder / "plan.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, plan)
        return
    changed = differences(read_json(file), json.loads(json.dumps(plan)))
    if changed:
        raise UserError(
            f"{folder} holds images drawn otherwise ({'; '.join(changed)[:300]}): "
            f"give --out ANOTHER, or delete it"
        )


def check_disk(folder: Path, needed: int) -> None:
    """UserError where the disk has less than `needed` bytes left."""
    if free_space(folder) < needed:
        raise UserError(f"{folder} may need {needed / 1e6:,.0f} MB, and the disk has less")


def draw(
    pipe: Pipeline,
    labels: Sequence[int | None],
    seed: int,
    folder: Path,
    settings: dict[str, Any],
    batch_size: int = 64,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Draw those images that `folder` lacks: image i of class labels[i] with seed `seed` + i.

    Returns how many it drew. share: (k, n) draws only every n-th image from the k-th on, as
    process k of n does. A batch is written, in threads, while the next one is drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(share[0], len(labels), share[1])
    missing = [i for i in mine if not image_file(folder, i).exists()]
    told = meter(len(mine), "drawing", "images", done=len(mine) - len(missing))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool, told as advance:
        writing: list[Future[None]] = []
        for start in range(0, len(missing), batch_size):
            rows = missing[start : start + batch_size]
            images = pipe.sample(
                [labels[i] for i in rows],
                seed=[seed + i for i in rows],
                batch_size=batch_size,
                **settings,
            )
            if not images.isfinite().all():
                raise UserError(
                    f"of images {rows[0]} to {rows[-1]} some are not finite numbers: "
                    "look at the model's weights, or try --dtype fp32"
                )
            _wait(writing, advance)
            for i, picture in zip(rows, to_pictures(images), strict=True):
                label = labels[i]
                name = None if label is None else pipe.labels[label]
                record = {"class": name, "label": label, "seed": seed + i, "settings": settings}
                writing.append(pool.submit(write_image, image_file(folder, i), picture, record))
        _wait(writing, advance)
    return len(missing)


def _wait(writing: list[Future[None]], advance: Advance) -> None:
    """Until these images are written; raises what went wrong."""
    for image in writing:
        image.result()
    if writing:
        advance(len(writing))
    writing.clear()


def write_image(file: Path, picture: Image, record: dict[str, Any]) -> None:
    """A PNG that is there whole or not at all, and says what it was drawn by."""
    write_whole(file, to_png(picture, record, compress_level=1))


def image_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.png"


def check_complete(folder: Path, count: int) -> None:
    """UserError unless `folder` has the images 0 to count - 1 and no others."""
    there = {path.name for path in folder.glob("[!.]*")}
    wanted = {image_file(folder, i).name for i in range(count)}
    if there != wanted:
        missing, extra = sorted(wanted - there), sorted(there - wanted)
        what = f"{len(missing)} images are missing ({', '.join(missing[:3])})" if missing else ""
        what += f" {len(extra)} are none of its own ({', '.join(extra[:3])})" if extra else ""
        raise UserError(f"{folder}: {what.strip()}: run the command again, or delete the folder")
