"""CLIP-score of a set of images with their captions, or with prompts of their classes."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from clip.preprocess import MIN_SIDE
from clip.score import (
    CONVENTIONS,
    clip_score,
    encode_images,
    ref_clip_score,
    score_images,
    summarise,
    texts_for,
)
from clip.texts import Texts, count_cut, encode_texts, several
from maskgit.common import UserError
from maskgit.common.folder import read_json
from maskgit.common.progress import progress
from maskgit.engine.images import BadImage, decode
from maskgit.engine.sources import (
    BUNDLED_SHARDS,
    Item,
    expand_shards,
    list_bundled,
    list_folder,
    list_shards,
)
from maskgit.evaluation.clip_model import ClipModel
from maskgit.evaluation.extractors import precision
from maskgit.evaluation.prompts import class_texts
from maskgit.evaluation.sets import MAX_PIXELS, THREADS, PixelSet, ahead, read, unusable
from maskgit.metadata import from_png

BATCH = 64  # images encoded at once
RECORDS = "metadata.json"  # that `maskgit sample` writes beside its images
DEPENDENT = "reranked by the model that scores"


class Looked(NamedTuple):
    """What an image file says before it is decoded."""

    digest: bytes
    jpeg: bool
    record: dict[str, Any]  # what this toolkit made it by, {} if it did not


@dataclass(eq=False)
class Pictures:
    """Images of any sizes, with the names by which captions find them."""

    name: str  # as it was given
    items: list[Item]
    classes: list[str]
    looked: list[Looked]

    def batches(self) -> Iterator[list[Image.Image]]:
        """All images once. Raises UserError for one that cannot be used."""
        for start in range(0, len(self.items), BATCH):
            tasks = (partial(_decode, item) for item in self.items[start : start + BATCH])
            yield list(ahead(tasks, THREADS))

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(b"".join(one.digest for one in self.looked)).hexdigest()
        jpeg = sum(one.jpeg for one in self.looked)
        return {"name": self.name, "hash": digest, "count": len(self.items), "jpeg": jpeg}


def open_pictures(source: str, tables: Sequence[Path] = ()) -> Pictures:
    """A bundled set ("emoji", "emoji:heldout"), an image folder, or tar shards.

    tables: files of captions, which may lie in the folder and are no images. Raises UserError for
    what is missing, broken, or too small to show anything.
    """
    path = Path(source).expanduser()
    if source in BUNDLED_SHARDS:
        items, classes = list_bundled(source, "train")
    elif path.is_dir():
        items, classes = list_folder(path)
        others = {table.expanduser().resolve() for table in (*tables, path / RECORDS)}
        items = [item for item in items if Path(item.file).resolve() not in others]
    elif shards := expand_shards(source):
        items, classes = list_shards(shards)
    else:
        raise UserError(f"{source} is no folder: give one, .tar shards, or emoji or emoji:heldout")
    if not items:
        raise UserError(f"no images in {source}: it holds tables alone")
    looks = (partial(_look, item) for item in items)
    looked = list(progress(ahead(looks, THREADS), f"reading {source}", len(items), "images"))
    return Pictures(source, items, classes, looked)


def _look(item: Item) -> Looked:
    content = read(item)
    try:
        with Image.open(io.BytesIO(content)) as image:
            size, jpeg, record = image.size, image.format in ("JPEG", "MPO"), from_png(image)
    except Exception as error:  # on damaged bytes, decoders raise nearly anything
        raise unusable(item, str(error).split("<")[0].strip() or type(error).__name__) from None
    if min(size) < MIN_SIDE:
        raise unusable(item, f"too small: {size[0]}x{size[1]} pixels, and {MIN_SIDE} are the least")
    return Looked(hashlib.sha256(content).digest(), jpeg, record)


def _decode(item: Item) -> Image.Image:
    """The image, RGB, at its own size: a JPEG decoded at less would be scaled twice."""
    try:
        return Image.fromarray(decode(read(item), (MAX_PIXELS, MAX_PIXELS), MAX_PIXELS))
    except BadImage as error:
        raise unusable(item, str(error)) from None


def records_of(pictures: Pictures) -> list[dict[str, Any]]:
    """What each image, or else the metadata.json beside it, says that it was made by."""
    table = Path(pictures.name).expanduser() / RECORDS
    content = read_json(table) if table.is_file() else {}
    listed = content.get("images", []) if isinstance(content, dict) else []
    by_file = {r.get("file"): r for r in listed if isinstance(r, dict)}
    pairs = zip(pictures.items, pictures.looked, strict=True)
    return [one.record or by_file.get(item.name, {}) for item, one in pairs]


def class_names(pictures: Pictures) -> list[str]:
    """The class of each image: its folder's or its shard's, else what it was made as. Raises
    UserError for an image of no class."""
    if pictures.classes:
        names = [pictures.classes[i] if i >= 0 else None for i in (x.label for x in pictures.items)]
    else:
        names = [record.get("class") for record in records_of(pictures)]
    for item, name in zip(pictures.items, names, strict=True):
        if not isinstance(name, str):
            raise UserError(
                f"--labels: {item.where} has no class: put it into a folder of that name, or give "
                "--captions FILE"
            )
    return [str(name) for name in names]


def prompts_of(pictures: Pictures) -> list[Texts]:
    """What the class of each image is called, see `class_texts`."""
    names = class_names(pictures)
    classes = pictures.classes or sorted(set(names))
    known = dict(zip(classes, class_texts(classes), strict=True))
    return [known[name] for name in names]


def check_independent(pictures: Pictures, clip: ClipModel) -> str | None:
    """Why the score says less than it seems to: whether any image was chosen by this very CLIP."""
    chosen_by = (record.get("rerank") for record in records_of(pictures))
    same = any(isinstance(by, dict) and by.get("sha256") == clip.sha256 for by in chosen_by)
    return DEPENDENT if same else None


def score_pictures(
    clip: ClipModel,
    pictures: Pictures,
    texts: Sequence[Sequence[Texts]],
    convention: str = "hessel",
    references: Sequence[Sequence[Texts]] | None = None,
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The metrics of `pictures`, what they were made by, and a row for each image and caption.

    texts: one or several of each image, whose score is the mean over them, so that images, which
    are independent, are what the standard error counts. (One that is itself several texts, as the
    prompts of a class are, has their mean feature.) references: likewise, for RefCLIPScore.
    """
    rows = [i for i, own in enumerate(texts) for _ in own]  # the image of each pair
    plain = [text for own in texts for text in own]
    full = texts_for(plain, convention)
    with precision("ieee"):
        text = encode_texts(clip.model, full)  # (P, E)
    batches = progress(pictures.batches(), "scoring", -(-len(pictures.items) // BATCH), "batches")
    with precision("ieee"):
        image = encode_images(clip.model, batches)[torch.tensor(rows)]  # (P, E)
    values = {f"CLIP-score-{convention}": clip_score(image, text, convention)}
    if references is not None:
        others = [texts_for(own, convention) for own in references]
        with precision("ieee"):
            features = encode_texts(clip.model, [t for own in others for t in own])
        each = features.split([len(own) for own in others])
        values["RefCLIPScore"] = ref_clip_score(image, text, [each[i] for i in rows])
        full += [t for own in others for t in own]
    found = {name: summary(_over_captions(value, rows)) for name, value in values.items()}
    how = describe(clip, convention, count_cut(clip.model, full))
    scores = {name: value.tolist() for name, value in values.items()}
    table = [
        {"id": pictures.items[i].name, "caption": " / ".join(several(plain[p]))}
        | {"score" if name != "RefCLIPScore" else name: v[p] for name, v in scores.items()}
        for p, i in enumerate(rows)
    ]
    return found, how, table


def score_set(
    clip: ClipModel, images: PixelSet, prompts: Sequence[Texts], convention: str = "hessel"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """For images of one size and the prompts of their classes: the metric, and how it was made."""
    batches = (batch.float() / 255 for batch in images.batches(BATCH))
    with precision("ieee"):
        scores, cut = score_images(clip.model, batches, prompts, convention)
    how = describe(clip, convention, cut) | {"texts": {"kind": "class prompts"}}
    return {f"CLIP-score-{convention}": summary(scores)}, how


def describe(clip: ClipModel, convention: str, truncated: int) -> dict[str, Any]:
    """What of a CLIP-score has to be known to compare it."""
    prefix = CONVENTIONS[convention].prefix
    how = {"convention": convention, "prefix": prefix, "truncated": truncated}
    return {**how, "model": clip.describe()}


def summary(scores: Tensor) -> dict[str, Any]:
    """The value of (N,) scores as it stands in metrics.json."""
    found = summarise(scores)
    value: dict[str, Any] = {"value": found.pop("mean"), **found}
    if found["interval"]:
        low, high = found["interval"]
        value["over"] = f"standard error, n={found['n']:,}; 95 %: {low:.4g} to {high:.4g}"
    return value


def _over_captions(scores: Tensor, rows: Sequence[int]) -> Tensor:
    """The mean over the pairs of each image; scores (P,), rows: the image of each."""
    index = torch.tensor(rows)
    total = torch.zeros(rows[-1] + 1, dtype=torch.float64).index_add_(0, index, scores.double())
    return total / index.bincount()
