"""How a run is begun or gone on with, and how each kind joins its task with its data."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from clip import CLIP
from clip.model import VisionTransformer
from clip.task import CLIPTask
from maskgit.common import UserError
from maskgit.common.device import pick_device
from maskgit.common.folder import file_hash, find, load_weights
from maskgit.engine.config import differences
from maskgit.engine.data import ImageSet, batches, in_order, open_images
from maskgit.engine.loop import Batch, Task, make_accelerator, train
from maskgit.engine.pairs import Pairs
from maskgit.engine.tokens import cached, fixed_batches, token_batches, tokenize
from maskgit.evaluation.classifier import Classifier
from maskgit.evaluation.classifier_task import ClassifierTask
from maskgit.evaluation.prompts import class_texts
from maskgit.model import MaskGIT
from maskgit.runs import ClassifierRun, CLIPRun, MaskGITRun, Run, VQGANRun
from maskgit.task import MaskGITTask
from vqgan import VQGAN
from vqgan.task import VQGANTask

Say = Callable[[str], None]
Sets = dict[str, Callable[[], Iterable[Batch]]]
Joined = tuple[Task, Callable[[int], Iterator[Batch]], Sets]
# What a run that goes on may change.
FREE = {"run", "size", "data.workers", "sampling"}
FREE |= {f"train.{name}" for name in ("steps", "device", "compile", "keep_last")}
FREE |= {f"train.{name}_every" for name in ("log", "validate", "draw", "save")}


def start(run: Any, say: Say = print) -> dict[str, float] | None:
    """Train, or go on training, what `run` describes: the last metrics, None if it had finished."""
    folder = Path(run.run)
    settings = OmegaConf.structured(run).copy()  # as given: joining fills in what follows from data
    check_folder(folder, OmegaConf.to_container(settings))
    make_accelerator(run.train)  # raises now, if it cannot be had
    torch.manual_seed(run.train.seed)
    task, stream, validation = JOINS[run.task](run, folder, say)
    folder.mkdir(parents=True, exist_ok=True)
    partial_file = folder / ".config.yaml"
    partial_file.write_text(OmegaConf.to_yaml(settings))
    partial_file.replace(folder / "config.yaml")
    return train(task, stream, validation, run.train, folder, say)


def check_folder(folder: Path, settings: Any) -> None:
    """Refuse to go on with a run that other settings began; or in a folder that is not writable."""
    above = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to run={folder}: {above} is no folder that lets one")
    if not any((folder / "checkpoints").glob("step_*")):
        return
    try:
        before = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        raise UserError(f"{folder} has checkpoints but no config.yaml: give run=ANOTHER") from None
    changed = [
        line
        for line in differences(before, settings)
        if not FREE & {(key := line.split(":")[0]), key.split(".")[0]}
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run with another config ({'; '.join(changed)}): "
            f"give run=ANOTHER_FOLDER, or delete this one"
        )


def vqgan_run(run: VQGANRun, folder: Path, say: Say) -> Joined:
    """The tokenizer's task, its batches of images, and the held-out images."""
    images, heldout = open_images(run.data), open_images(run.data, "heldout")
    model = VQGAN(run.model)
    check_size(run.data.size, run.model.factor)
    if run.init:
        initialise(model, VQGAN.from_pretrained(run.init), run.init)
        run.loss.quantize_from = 0  # its codebook is part of what it starts from
    elif run.loss.decoder_only:
        raise UserError("loss.decoder_only needs a tokenizer to start from: give init=FOLDER")
    if run.loss.quantize_from >= run.train.steps:
        raise UserError(
            f"loss.quantize_from={run.loss.quantize_from} leaves none of the {run.train.steps} "
            f"steps for the codebook: set it lower"
        )
    task = VQGANTask(model, run.loss, run.discriminator, min(run.data.size))
    return task, image_stream(run, images), {"heldout": lambda: in_order(heldout, 64)}


def maskgit_run(run: MaskGITRun, folder: Path, say: Say) -> Joined:
    """The transformer's task, its batches of cached tokens, and held-out and training tokens."""
    source = find(run.tokenizer)
    tokenizer = VQGAN.from_pretrained(source).to(pick_device(run.train.device))
    if run.tokenizer == "emoji" and run.data.path.partition(":")[0] != "emoji":
        say(
            "warning: the bundled tokenizer was trained on emoji; on other pictures it "
            "reconstructs badly: train one (maskgit train emoji_vqgan data.path=...) and give "
            "tokenizer=RUN/export"
        )
    images, heldout = open_images(run.data), open_images(run.data, "heldout")
    check_size(run.data.size, tokenizer.config.factor)
    run.model.codebook_size = tokenizer.config.codebook_size
    run.model.num_classes = len(images.classes)
    run.model.grid = [side // tokenizer.config.factor for side in run.data.size]
    run.model.has_null_label = run.loss.label_dropout > 0
    model = MaskGIT(run.model)
    if run.init:
        initialise(model, MaskGIT.from_pretrained(run.init), run.init)
    sampling = dict(run.sampling)
    if not set(sampling.get("showcase", [])) <= set(images.classes):
        del sampling["showcase"]  # the classes of other data
    if model.config.null_label is None:
        sampling.pop("guidance", None)
    task = MaskGITTask(model, run.loss, tokenizer, images.classes, sampling)
    sets = {
        name: cached(
            folder / f"tokens_{name}.safetensors",
            token_stamp(source, some),
            partial(tokenize, some, tokenizer.encode, pick_device(run.train.device)),
        )
        for name, some in {"train": images, "heldout": heldout}.items()
    }

    def stream(step: int) -> Iterator[Batch]:
        return token_batches(
            sets["train"],
            run.train.batch_size,
            seed=run.train.seed,
            start_step=step,
            balanced=run.data.balanced,
        )

    same = len(sets["heldout"])
    validation: Sets = {name: partial(fixed_batches, some, 64, same) for name, some in sets.items()}
    return task, stream, validation


def classifier_run(run: ClassifierRun, folder: Path, say: Say) -> Joined:
    """The classifier's task, its batches of images, and the held-out images."""
    images, heldout = open_images(run.data), open_images(run.data, "heldout")
    if not images.classes:
        raise UserError(f"{run.data.path} has no classes: put the images of each into a folder")
    run.model.num_classes = len(images.classes)
    model = Classifier(run.model)
    if run.init:
        initialise(model, Classifier.from_pretrained(run.init), run.init)
    task = ClassifierTask(model, run.loss, images.classes)
    return task, image_stream(run, images), {"heldout": lambda: in_order(heldout, 64)}


def clip_run(run: CLIPRun, folder: Path, say: Say) -> Joined:
    """CLIP's task, its batches of images with a caption each, and held-out pairs."""
    images, heldout = open_images(run.data), open_images(run.data, "heldout")
    model = CLIP(run.model)
    if run.init:
        start_clip(model, CLIP.from_pretrained(run.init), run.init, run.loss.locked)
    elif run.loss.locked:
        raise UserError("loss.locked needs a tower worth keeping: give init=FOLDER")
    if run.train.batch_size < 2 and run.model.loss == "infonce":
        raise UserError("train.batch_size=1 has nothing to contrast: take 2 or more")
    if run.loss.locked == "image" and (run.data.mirror or run.data.crop != "center"):
        raise UserError(
            "loss.locked=image computes the features of each image once: they cannot be varied "
            "(data.mirror=false data.crop=center)"
        )
    if list(run.data.size) != run.model.image.size:
        raise UserError(
            f"data.size={list(run.data.size)} is not what the image tower takes, "
            f"model.image.size={run.model.image.size}"
        )
    if run.captions and Path(run.captions).resolve().is_relative_to(Path(run.data.path).resolve()):
        raise UserError(f"captions={run.captions} lies among the images: put it elsewhere")
    pairs, others = (Pairs(some, run.captions, model.tokenizer) for some in (images, heldout))
    cut = sum(model.tokenizer.too_long(pairs.texts))
    say(f"{len(images):,} images, {len(pairs.texts):,} different captions, {cut:,} of them cut")
    stream = image_stream(run, images)
    task = CLIPTask(model, run.loss, images.classes, class_texts(images.classes))
    return (
        task,
        lambda step: pairs.drawn(stream(step), run.train.seed, step),
        {"heldout": lambda: others.first(in_order(heldout, 64))},
    )


def start_clip(model: CLIP, source: CLIP, name: str, locked: str | None) -> None:
    """Start from the weights of `source`: from all of them, with the positions of a ViT stretched
    to another size of images; or, where a tower is locked, from those of that tower alone."""
    if locked:
        initialise(model.tower(locked), source.tower(locked), name)
        return
    size = model.config.image.size
    if source.config.image.size != size and isinstance(source.visual, VisionTransformer):
        positions = source.visual.positions(model.config.image.grid).detach()
        source.visual.positional_embedding = torch.nn.Parameter(positions)
        source.config.image.size = size
    initialise(model, source, name)


def image_stream(run: Run, images: ImageSet) -> Callable[[int], Iterator[Batch]]:
    """Batches of images from a step on, as the run wants them."""
    return lambda step: batches(
        images,
        run.train.batch_size,
        seed=run.train.seed,
        start_step=step,
        balanced=run.data.balanced,
        workers=run.data.workers,
    )


def check_size(size: list[int], factor: int) -> None:
    if any(side % factor for side in size):
        raise UserError(f"data.size={list(size)} is no multiple of {factor} pixels a token")


def token_stamp(tokenizer: Path, images: ImageSet) -> dict[str, str]:
    """What cached tokens depend on."""
    inner = tokenizer / "vqgan"
    weights = (inner if inner.is_dir() else tokenizer) / "model.safetensors"
    config = images.config
    return {
        "tokenizer": file_hash(weights),
        "data": images.fingerprint,
        "size": str(list(config.size)),
        "mirror": str((config.mirror, sorted(config.no_mirror))),
    }


def initialise(model: Any, source: Any, name: str) -> None:
    """Start from the weights of `source`, a model of the same shape; else UserError says where
    they differ."""
    new, old = (shaping(asdict(m.config)) for m in (model, source))
    if new != old:
        listed = "; ".join(differences(old, new))
        raise UserError(f"init={name}: its weights do not fit this model ({listed})")
    load_weights(model, source.state_dict(), f"init={name}")


def shaping(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config without what changes neither its weights nor what they mean."""
    free = {"dropout", "patch_dropout", "max_scale", "scale", "bias", "recipe"}
    return {
        key: shaping(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in free or isinstance(value, bool)  # a text tower's bias is a shape
    }


JOINS: dict[str, Callable[..., Joined]] = {
    "vqgan": vqgan_run,
    "maskgit": maskgit_run,
    "classifier": classifier_run,
    "clip": clip_run,
}
