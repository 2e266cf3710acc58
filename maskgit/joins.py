"""How a run is begun or gone on with, and how each kind joins its task with its data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from clip import CLIP
from clip.model import VisionTransformer
from clip.task import CLIPTask
from maskgit.checkup import foreign
from maskgit.common import UserError
from maskgit.common.device import pick_device
from maskgit.common.folder import load_weights, locked, write_whole
from maskgit.common.processes import on_main, rank, telling_of_others, world
from maskgit.common.signals import deadly, held
from maskgit.engine.config import differences
from maskgit.engine.data import ImageSet, batches, in_order, open_images
from maskgit.engine.journal import check_trackers
from maskgit.engine.loop import make_accelerator, train
from maskgit.engine.pairs import Pairs
from maskgit.engine.task import Batch, Task
from maskgit.engine.tokens import fixed_batches, token_batches
from maskgit.evaluation.classifier import Classifier
from maskgit.evaluation.classifier_task import ClassifierTask
from maskgit.evaluation.prompts import class_texts
from maskgit.model import MaskGIT
from maskgit.resize import class_names, resized
from maskgit.run_folder import begun, check_config, check_writable, holds_something, set_aside
from maskgit.runs import ClassifierRun, CLIPRun, MaskGITRun, Run, VQGANRun
from maskgit.task import MaskGITTask
from maskgit.tokenized import token_sets
from vqgan import VQGAN
from vqgan.task import VQGANTask

Say = Callable[[str], None]
Sets = dict[str, Callable[[], Iterable[Batch]]]


class Joined(NamedTuple):
    """A task, its batches from a step on, the sets that it is validated on, and hashes of what it
    learns from, which stay the same while a run goes on."""

    task: Task
    stream: Callable[[int], Iterator[Batch]]
    validation: Sets
    source: dict[str, str]


def start(run: Any, restart: bool = False, say: Say = print) -> dict[str, float] | None:
    """Train, or go on training, what `run` describes: the last metrics, None if it had finished.

    restart: begin anew even where `run.run` holds a run, which is then moved aside.
    """
    folder = Path(run.run)
    with deadly():
        text = OmegaConf.to_yaml(OmegaConf.structured(run))  # joining fills in what follows
        make_accelerator(run.train)  # raises now, if it cannot be had; and starts the processes
        check_trackers(run.train.trackers)
    say = said_once(say)
    with ExitStack() as stack:
        if world() > 1:  # one that left at a signal would leave the others waiting
            stack.enter_context(held())
        stack.enter_context(telling_of_others())

        def enter() -> None:
            check_writable(folder)
            stack.enter_context(locked(folder))
            if restart and holds_something(folder):
                say(f"the run before is now {set_aside(folder)}")
            check_config(folder, run)

        on_main(enter)
        torch.manual_seed(run.train.seed)
        task, stream, validation, source = JOINS[run.task](run, folder, say)
        on_main(lambda: write_whole(folder / "config.yaml", text.encode()))
        return train(task, stream, validation, run.train, folder, say, source)


def said_once(say: Say) -> Say:
    """`say` in the main process, and nothing in others."""
    return say if rank() == 0 else lambda line: None


def vqgan_run(run: VQGANRun, folder: Path, say: Say) -> Joined:
    """The tokenizer's task, its batches of images, and the held-out images."""
    images, heldout = open_images(run.data), open_images(run.data, "heldout")
    model = VQGAN(run.model)
    check_size(run.data.size, run.model.factor)
    if run.init:
        run.loss.quantize_from = 0  # its codebook is part of what it starts from
        if not begun(folder):
            initialise(model, VQGAN.from_pretrained(run.init), run.init)
    elif run.loss.decoder_only:
        raise UserError("loss.decoder_only needs a tokenizer to start from: give init=FOLDER")
    if run.loss.quantize_from >= run.train.steps:
        raise UserError(
            f"loss.quantize_from={run.loss.quantize_from} leaves none of the {run.train.steps} "
            f"steps for the codebook: set it lower"
        )
    task = VQGANTask(model, run.loss, run.discriminator, min(run.data.size))
    sets: Sets = {"heldout": lambda: in_order(heldout, 64)}
    return Joined(task, image_stream(run, images), sets, {"data": images.fingerprint})


def maskgit_run(run: MaskGITRun, folder: Path, say: Say) -> Joined:
    """The transformer's task, its batches of cached tokens, and held-out and training tokens."""
    tokenizer = VQGAN.from_pretrained(run.tokenizer).to(pick_device(run.train.device))
    stamp, make = token_sets(run, folder, tokenizer)
    if run.tokenizer == "emoji" and stamp.data_path.partition(":")[0] != "emoji":
        say(
            "warning: the bundled tokenizer was trained on emoji; on other pictures it "
            "reconstructs badly: train one (maskgit train emoji_vqgan data.path=...) and give "
            "tokenizer=RUN/export"
        )
    run.model.codebook_size = stamp.codebook_size
    run.model.num_classes = len(stamp.classes)
    run.model.grid = stamp.grid
    run.model.has_null_label = run.loss.label_dropout > 0
    model = MaskGIT(run.model)
    if run.init and not begun(folder):
        source = MaskGIT.from_pretrained(run.init)
        old = class_names(run.init, source.config.num_classes, stamp.classes)
        source, said = resized(source, run.model, old, stamp.classes)
        initialise(model, source, run.init)
        for line in (*foreign(run.init, run.tokenizer), *said):
            say(f"init={run.init}: {line}")
    sampling = dict(run.sampling)
    if not set(sampling.get("showcase", [])) <= set(stamp.classes):
        del sampling["showcase"]  # the classes of other data
    if model.config.null_label is None:
        sampling.pop("guidance", None)
    MaskGITTask(model, run.loss, tokenizer, stamp.classes, sampling)  # raises before all else
    sets = make()
    commonest = sets["train"].commonest()
    task = MaskGITTask(model, run.loss, tokenizer, stamp.classes, sampling, commonest)

    def stream(step: int) -> Iterator[Batch]:
        return token_batches(
            sets["train"],
            run.train.batch_size,
            seed=run.train.seed,
            start_step=step,
            balanced=run.data.balanced,
            rank=rank(),
            world_size=world(),
        )

    same = len(sets["heldout"])
    validation: Sets = {name: partial(fixed_batches, some, 64, same) for name, some in sets.items()}
    hashes = {"data": stamp.data, "tokenizer": stamp.tokenizer, "crops": str(stamp.crops)}
    return Joined(task, stream, validation, hashes)


def classifier_run(run: ClassifierRun, folder: Path, say: Say) -> Joined:
    """The classifier's task, its batches of images, and the held-out images."""
    images, heldout = open_images(run.data), open_images(run.data, "heldout")
    if not images.classes:
        raise UserError(f"{run.data.path} has no classes: put the images of each into a folder")
    run.model.num_classes = len(images.classes)
    model = Classifier(run.model)
    if run.init and not begun(folder):
        initialise(model, Classifier.from_pretrained(run.init), run.init)
    task = ClassifierTask(model, run.loss, images.classes)
    sets: Sets = {"heldout": lambda: in_order(heldout, 64)}
    return Joined(task, image_stream(run, images), sets, {"data": images.fingerprint})


def clip_run(run: CLIPRun, folder: Path, say: Say) -> Joined:
    """CLIP's task, its batches of images with a caption each, and held-out pairs."""
    images, heldout = open_images(run.data), open_images(run.data, "heldout")
    model = CLIP(run.model)
    if run.loss.locked and not run.init:
        raise UserError("loss.locked needs a tower worth keeping: give init=FOLDER")
    if run.init and not begun(folder):
        start_clip(model, CLIP.from_pretrained(run.init), run.init, run.loss.locked)
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
    return Joined(
        task,
        lambda step: pairs.drawn(stream(step)),
        {"heldout": lambda: others.first(in_order(heldout, 64))},
        {"data": images.fingerprint, "captions": pairs.fingerprint},
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
        rank=rank(),
        world_size=world(),
    )


def check_size(size: list[int], factor: int) -> None:
    if any(side % factor for side in size):
        raise UserError(f"data.size={list(size)} is no multiple of {factor} pixels a token")


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
