"""What a CLIP can do without training: name images by texts, and find images and texts by each
other.

Shapes: N images, M captions, K classes, E width of the features, which have unit length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clip.texts import AT_ONCE, Texts, check_templates, class_prompts, encode_texts
from maskgit.common import UserError, pick

if TYPE_CHECKING:
    from clip.model import CLIP

TIE = 1e-6  # cosines closer than this count as equal: fp32 rounds sums of products by about as much
BLOCK = 4096  # rows and columns of the cosines in memory at a time


@cache
def imagenet() -> dict[str, Any]:
    """Facts about ImageNet's zero-shot protocol: `names` of the 1,000 classes in the order of
    their WordNet ids, `templates` by name (imagenet: OpenAI's 80, imagenet7: its subset),
    `published` top-1 in per cent by recipe, and their `source`."""
    return json.loads((Path(__file__).parent / "assets" / "imagenet.json").read_text())


def templates(name: str) -> list[str]:
    """The prompt templates called `name`; raises UserError if there are none."""
    return pick(imagenet()["templates"], name, "set of templates")


def published(recipe: str, classes: Sequence[str]) -> float | None:
    """The top-1 in [0, 1] that the paper states for weights of this recipe on ImageNet; None for
    other weights, and for other classes than ImageNet's."""
    top1 = imagenet()["published"].get(recipe)
    return top1 / 100 if top1 and list(classes) == imagenet()["names"] else None


def class_weights(
    model: CLIP, names: Iterable[Texts], templates: Sequence[str] = ("{}",)
) -> Tensor:
    """(K, E) of unit length, on the model's device: of each class the mean feature of its name, or
    its names, in all templates (see `encode_texts`). Raises UserError for a template without {}."""
    check_templates(templates)
    rest, rows = iter(names), []
    while chunk := list(islice(rest, max(1, AT_ONCE // len(templates)))):
        rows.append(encode_texts(model, class_prompts(chunk, templates)))
    if not rows:
        raise UserError("there are no classes to choose from")
    return torch.cat(rows).to(model.device)


@dataclass
class ZeroShot:
    """Shares in [0, 1] of how images were classified, and with what confidence."""

    top1: float
    top5: float
    per_class: float  # mean of the top-1 of each class that has images
    counts: list[int]  # images of each class
    cross_entropy: float  # mean of -log(probability of the right class), in nats
    probabilities: Tensor  # (N, K) float32, on the CPU


def zero_shot(
    image_features: Tensor, weights: Tensor, labels: Tensor, scale: Tensor | float
) -> ZeroShot:
    """Classify (N, E) by the nearest of the (K, E) of `class_weights`; labels (N,) int64.

    scale: exp(logit_scale), by which cosines are multiplied before the softmax. Classes that are
    equally near, as two of one name are, share the places that they take: the expectation over a
    random order, so that a model that cannot tell any classes scores by chance.
    """
    check_features(image_features, weights, "class weights")
    count, classes = len(image_features), len(weights)
    if count == 0 or len(labels) != count or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{len(labels)} labels for {count} images of {classes} classes do not fit")
    labels = labels.cpu()
    weights = weights.float()
    found: list[Tensor] = []
    places: dict[int, list[Tensor]] = {1: [], 5: []}
    for start in range(0, count, BLOCK):
        right = labels[start : start + BLOCK, None]  # (n, 1)
        cosines = (image_features[start : start + BLOCK].to(weights) @ weights.T).cpu()  # (n, K)
        own = cosines.gather(1, right)
        ahead = (cosines > own + TIE).sum(1)
        # what is not finite is never found: it compares as behind nothing
        level = (~(cosines < own - TIE)).sum(1) - ahead  # itself, and those equally near
        for k, hits in places.items():
            share = ((k - ahead) / level.clamp(min=1)).clamp(0, 1)
            hits.append(share.where(own[:, 0].isfinite(), 0.0))
        found.append((cosines * float(scale)).softmax(1))
    top1, top5 = (torch.cat(hits).double() for hits in places.values())
    probabilities = torch.cat(found)
    counts = torch.bincount(labels, minlength=classes)
    each = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, top1) / counts
    likely = probabilities.gather(1, labels[:, None]).double().clamp(min=1e-45)
    return ZeroShot(
        top1=float(top1.mean()),
        top5=float(top5.mean()),
        per_class=float(each[counts > 0].mean()),
        counts=counts.tolist(),
        cross_entropy=float(-likely.log().mean()),
        probabilities=probabilities,
    )


@torch.no_grad()
def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    owner: Tensor,
    at: Sequence[int] = (1, 5, 10),
    block: int = BLOCK,
) -> dict[str, float]:
    """Recall in [0, 1] both ways: `image_to_text@k` is the share of images (N, E) with a caption of
    their own among the k nearest of all captions (M, E), `text_to_image@k` the share of captions
    with their image among the k nearest. owner: (M,) int64, the image of each caption.

    What is equally near as the right one counts as nearer (pessimistic): neither a model that gives
    one feature to all nor one that gives NaN finds anything. At most `block` x `block` cosines are
    in memory at a time. Raises UserError for an image without a caption.
    """
    check_features(image_features, text_features, "captions")
    images, texts = image_features, text_features.to(image_features)
    owner = owner.to(images.device)
    count = len(images)
    if len(owner) != len(texts) or len(owner) == 0 or owner.min() < 0 or owner.max() >= count:
        raise UserError(f"{len(owner)} owners for {len(texts)} captions of {count} images")
    captions = torch.bincount(owner, minlength=count)
    if (lacking := captions == 0).any():
        raise UserError(
            f"{int(lacking.sum())} of {count} images have no caption, first image "
            f"{int(lacking.nonzero()[0])}: leave them out, or give them captions"
        )
    own = torch.cat(  # (M,), the cosine of each caption and its image
        [
            (texts[i : i + block] * images[owner[i : i + block]]).sum(1)
            for i in range(0, len(texts), block)
        ]
    )
    best = own.new_full((count,), -torch.inf).scatter_reduce(0, owner, own, "amax")  # (N,)
    # The place of the right one: of an image, foreign captions as near as its own best; of a
    # caption, foreign images as near as its own.
    image_rank = torch.zeros(count, dtype=torch.int64, device=images.device)
    text_rank = torch.zeros(len(texts), dtype=torch.int64, device=images.device)
    for i in range(0, count, block):
        rows = torch.arange(i, min(i + block, count), device=images.device)[:, None]
        for j in range(0, len(texts), block):
            at_texts = slice(j, j + block)
            cosines = images[i : i + block] @ texts[at_texts].T  # (n, m)
            foreign = owner[at_texts] != rows
            # "not below" and not "above or equal": a comparison with NaN is false
            ahead = ~(cosines < best[i : i + block, None] - TIE) & foreign
            image_rank[i : i + block] += ahead.sum(1)
            ahead = ~(cosines < own[at_texts] - TIE) & foreign
            text_rank[at_texts] += ahead.sum(0)
    ranks = {"image_to_text": image_rank, "text_to_image": text_rank}
    return {f"{way}@{k}": float((r < k).double().mean()) for way, r in ranks.items() for k in at}


def wilson(share: float, count: float, confidence: float = 0.95) -> tuple[float, float]:
    """The interval in which the true share lies, where `share` in [0, 1] of `count` independent
    trials succeeded (Wilson 1927); unlike share +- 2 deviations it holds near 0 and 1, too.

    count need not be whole: a weighted mean has the trials of `effective_count`. Where trials
    depend on each other, as captions of one image do, the true interval is wider.
    """
    if not 0 <= share <= 1 or count <= 0 or not 0 < confidence < 1:
        raise ValueError(f"share {share}, count {count}, confidence {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) * z
    half /= 1 + z * z / count
    # exact at the ends, where rounding would leave the share just outside its own interval
    low = 0.0 if share == 0 else max(0.0, middle - half)
    return low, 1.0 if share == 1 else min(1.0, middle + half)


def effective_count(counts: Sequence[int]) -> float:
    """How many equally weighted trials a mean of class means is worth: K^2 / sum(1 / n) over the K
    classes that have n > 0 trials (Kish 1965)."""
    some = [n for n in counts if n > 0]
    return len(some) ** 2 / sum(1 / n for n in some)


def check_features(image_features: Tensor, others: Tensor, what: str) -> None:
    """Raise UserError unless both are matrices of one width."""
    if image_features.ndim != 2 or others.ndim != 2 or image_features.shape[1] != others.shape[1]:
        raise UserError(
            f"image features {tuple(image_features.shape)} and {what} {tuple(others.shape)} do not "
            "fit: both need one row each and the same width, from one model"
        )
