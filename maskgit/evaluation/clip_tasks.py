"""The tasks of `maskgit evaluate clip`: features of the sets, numbers of them, tables and a plot.

Each number is a dict as it stands in metrics.json: `value`, the ends `low` and `high` of its 95 %
interval, and `n`, the trials that the interval counts.
"""

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip.probe import few_shot, linear_probe
from clip.score import encode_images
from clip.texts import class_prompts, count_cut, encode_texts
from clip.zero_shot import (
    class_weights,
    effective_count,
    published,
    retrieval,
    wilson,
    zero_shot,
)
from maskgit.common import UserError
from maskgit.common.progress import meter, progress
from maskgit.evaluation import cache, report
from maskgit.evaluation.clip_inputs import Inputs
from maskgit.evaluation.clip_model import ClipModel
from maskgit.evaluation.clip_score import BATCH, Pictures
from maskgit.evaluation.extractors import precision

AT = (1, 5, 10)  # the places among which retrieval looks
DRAWS = 3  # of the images of each few-shot probe, whose mean is reported
WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}

Value = dict[str, Any]
Metrics = dict[str, Value]


def with_interval(share: float, count: float) -> Value:
    low, high = wilson(share, count)
    return {"value": share, "low": low, "high": high, "n": count}


def features_of(clip: ClipModel, pictures: Pictures, folder: Path) -> Tensor:
    """(N, E) float32 of unit length on the CPU, kept in `folder` under a hash of the images, the
    weights and the recipe. Raises UserError for features that are not finite."""
    made_by = (clip.sha256, asdict(clip.model.config), pictures.describe()["hash"])
    key = hashlib.sha256(repr((*made_by, clip.model.device.type)).encode()).hexdigest()
    path = folder / f"clip-{key}.safetensors"
    kept = cache.load(path)
    if kept is not None:
        return kept["features"]
    total = -(-len(pictures.items) // BATCH)
    with precision("ieee"):
        batches = progress(pictures.batches(), f"encoding {pictures.name}", total, "batches")
        found = encode_images(clip.model, batches)
    if not found.isfinite().all():
        raise UserError(
            f"features of {pictures.name} are not finite: look at the weights of {clip.name}"
        )
    cache.save(path, {"features": found})
    return found


def truncated(clip: ClipModel, inputs: Inputs) -> int:
    """How many of the prompts and captions that the tasks need are longer than the model takes."""
    texts = [text for own in inputs.captions for text in own]
    if inputs.needs_prompts:
        texts += [t for way in inputs.ways.values() for own in class_prompts(*way) for t in own]
    return count_cut(clip.model, list(dict.fromkeys(texts))) if texts else 0


def measure_zero_shot(clip: ClipModel, inputs: Inputs, images: Tensor) -> Metrics:
    """Every way of making prompts; images: features (N, E). The last way is the fullest."""
    scale, labels = clip.model.logit_scale.detach().exp(), inputs.labels
    metrics: Metrics = {}
    for way, (names, templates) in inputs.ways.items():
        shown = progress(names, f"prompts, {way}", unit="classes")
        with precision("ieee"):
            weights = class_weights(clip.model, shown, templates)
            found = zero_shot(images, weights, labels, scale)
        count = len(labels)
        metrics[f"zero-shot top-1, {way}"] = with_interval(found.top1, count)
        metrics[f"zero-shot top-5, {way}"] = with_interval(found.top5, count)
        metrics[f"zero-shot mean of classes, {way}"] = with_interval(
            found.per_class, effective_count(found.counts)
        )
        # the mean of a logarithm, no share: it has no interval of this kind
        metrics[f"zero-shot cross-entropy, {way}"] = {"value": found.cross_entropy, "n": count}
    return metrics


def measure_retrieval(clip: ClipModel, inputs: Inputs, images: Tensor) -> Metrics:
    """Recall both ways, with what chance would give. Intervals count images: the captions of one
    image depend on each other."""
    texts = [text for own in inputs.captions for text in own]
    owner = torch.tensor([i for i, own in enumerate(inputs.captions) for _ in own])
    device = clip.model.device
    with precision("ieee"):
        found = retrieval(images.to(device), encode_texts(clip.model, texts).to(device), owner, AT)
    metrics: Metrics = {}
    for way, title in WAYS.items():
        for k in AT:
            chance = chance_of(way, owner.bincount().tolist(), k)
            value = with_interval(found[f"{way}@{k}"], len(images)) | {"chance": chance}
            metrics[f"{title} recall@{k}"] = value
    return metrics


def chance_of(way: str, captions: Sequence[int], k: int) -> float:
    """The recall@k of a random order; captions: how many each image has."""
    if way == "text_to_image":
        return min(1.0, k / len(captions))
    total, missed = sum(captions), {}
    for own in set(captions):  # the chance that none of its own is among the first k of all
        missed[own] = 1.0
        for place in range(min(k, total)):
            missed[own] *= max(0, total - own - place) / (total - place)
    return 1 - statistics.fmean(missed[own] for own in captions)


def measure_probe(
    clip: ClipModel, inputs: Inputs, images: Tensor, train: Tensor, seed: int
) -> tuple[Metrics, dict[str, Any]]:
    """A linear probe fitted on (M, E) and measured on (N, E): its accuracy, and how C was found."""
    assert inputs.train_labels is not None
    labels, classes = inputs.labels, len(inputs.names)
    features = train.to(clip.model.device)
    with meter(None, "linear probe", "fits") as fits:
        fitted, tried = linear_probe(features, inputs.train_labels, classes, seed, fits)
    accuracy = with_interval(fitted.accuracy(images, labels), len(labels))
    return {"probe top-1": accuracy}, {"C": fitted.C, "validation_accuracy_by_C": tried}


def usable_shots(inputs: Inputs, shots: Sequence[int]) -> tuple[list[int], dict[str, str]]:
    """Those of `shots` for which some class has so many images, and why not the others."""
    assert inputs.train_labels is not None and inputs.train is not None
    most = int(inputs.train_labels.bincount().max())
    left = {
        f"{k} shots": f"no class of {inputs.train.name} has more than {most} images"
        for k in shots
        if k > most
    }
    return sorted({k for k in shots if k <= most}), left


def measure_few_shot(
    clip: ClipModel,
    inputs: Inputs,
    images: Tensor,
    train: Tensor,
    shots: Sequence[int],
    seed: int,
) -> Metrics:
    """For each number of shots the mean accuracy of `DRAWS` probes, their deviation, how many
    images they were fitted on, and how many classes had fewer than that many."""
    assert inputs.train_labels is not None
    labels, classes = inputs.labels, len(inputs.names)
    counts = inputs.train_labels.bincount(minlength=classes)
    features = train.to(clip.model.device)
    metrics: Metrics = {}
    for k in progress(shots, "few-shot probes", unit="numbers of shots"):
        runs = []
        for draw in range(DRAWS):
            probe, fitted_on = few_shot(features, inputs.train_labels, classes, k, seed + draw)
            runs.append(probe.accuracy(images, labels))
        metrics[f"{k}-shot top-1"] = with_interval(statistics.fmean(runs), len(labels)) | {
            "deviation": statistics.stdev(runs),
            "over": f"{DRAWS} draws",
            "runs": runs,
            "images": fitted_on,
            "classes_with_fewer": int((counts < k).sum()),
        }
    return metrics


# What is shown


def show(value: Value) -> str:
    return f"{value['value']:.4f} ({value['low']:.3f}-{value['high']:.3f})"


def print_zero_shot(metrics: Metrics, ways: Sequence[str]) -> None:
    """The ways of making prompts side by side, with 95 % intervals."""
    rows = [
        (f"zero-shot {name}", *(show(metrics[f"zero-shot {name}, {way}"]) for way in ways))
        for name in ("top-1", "top-5", "mean of classes")
    ]
    entropies = (f"{metrics[f'zero-shot cross-entropy, {way}']['value']:.4f}" for way in ways)
    report.table(("95 % intervals", *ways), [*rows, ("zero-shot cross-entropy", *entropies)])


def print_retrieval(metrics: Metrics) -> None:
    rows = []
    for title in WAYS.values():
        own = [metrics[f"{title} recall@{k}"] for k in AT]
        rows.append((title, *(f"{show(v)}, chance {v['chance']:.3f}" for v in own)))
    report.table(("retrieval", *(f"recall@{k}" for k in AT)), rows)


def print_shots(metrics: Metrics, way: str, shots: Sequence[int]) -> None:
    """Zero-shot, few-shot and, where there is one, the probe on all images as one table."""
    rows = [("0 (zero-shot)", "0", show(metrics[f"zero-shot top-1, {way}"]), "-", "-")]
    for k in shots:
        value = metrics[f"{k}-shot top-1"]
        fewer, spread = str(value["classes_with_fewer"]), f"{value['deviation']:.3f}"
        rows.append((str(k), str(value["images"]), show(value), spread, fewer))
    if "probe top-1" in metrics:
        rows.append(("all", "all", show(metrics["probe top-1"]), "-", "-"))
    over = f"deviation over {DRAWS} draws"
    report.table(("shots", "images", "top-1 (95 %)", over, "classes with fewer"), rows)


def plot_shots(file: Path, metrics: Metrics, way: str, shots: Sequence[int]) -> None:
    """Accuracy of the probes against images a class, with 95 % intervals, and zero-shot beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    values = [metrics[f"{k}-shot top-1"] for k in shots]
    heights = [v["value"] for v in values]
    bars = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
    axis.errorbar(shots, heights, bars, marker="o", capsize=3, label="linear probe")
    zero = metrics[f"zero-shot top-1, {way}"]
    axis.axhline(zero["value"], color="C1", label=f"zero-shot, {way}")
    axis.axhspan(zero["low"], zero["high"], color="C1", alpha=0.15)
    axis.set(xscale="log", xlabel="labelled images a class", ylabel="top-1")
    axis.set_xticks(list(shots), [str(k) for k in shots])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    figure.tight_layout()
    report.save_figure(file, figure)


def expected(clip: ClipModel, inputs: Inputs) -> float | None:
    """What the paper states for these weights on these classes, with OpenAI's 80 templates."""
    return published(clip.published, list(map(str, inputs.names)))
