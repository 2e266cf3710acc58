"""CLIP-score: how well images go with texts, by a number that says which convention it follows.

Hessel et al. 2021, CLIPScore: A Reference-free Evaluation Metric for Image Captioning. Numbers of
two conventions, two models, or two prefixes do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clip.texts import Texts, count_cut, encode_texts, several
from maskgit.common import UserError, pick

if TYPE_CHECKING:
    from PIL.Image import Image

    from clip.model import CLIP

WIDTH_95 = 1.96  # standard errors from the mean to the end of a 95 % interval


@dataclass(frozen=True)
class Convention:
    """What a score makes of a cosine: `scale` times it, with `clamp` never below 0, of texts with
    `prefix` in front."""

    scale: float
    clamp: bool
    prefix: str


CONVENTIONS = {
    "hessel": Convention(2.5, True, "A photo depicts "),  # section 3 of the paper
    "percent": Convention(100.0, False, ""),  # torchmetrics; many papers call it CLIP score, too
    "cosine": Convention(1.0, False, ""),
}


def clip_score(image: Tensor, text: Tensor, convention: str = "hessel") -> Tensor:
    """The score (N,) of each pair of unit-length features (N, E) and (N, E).

    hessel: 0 to 2.5. percent: -100 to 100. cosine: -1 to 1. The convention's prefix belongs into
    the texts before they are encoded (`texts_for`). Raises UserError for an unknown convention and
    for features that do not fit each other or are not finite.
    """
    chosen = pick(CONVENTIONS, convention, "CLIP-score convention")
    scores = chosen.scale * _cosines(image, text)
    return scores.clamp_min(0) if chosen.clamp else scores


def ref_clip_score(image: Tensor, text: Tensor, references: Sequence[Tensor]) -> Tensor:
    """RefCLIPScore (N,), 0 to 1.43: the harmonic mean of the score under "hessel" and of the
    largest cosine between the text and its references, at least 0 (Hessel et al. 2021, 3).

    image, text: unit-length features (N, E); references: for each text the (R, E), R >= 1, of
    its references, which carry the same prefix. Raises UserError as `clip_score` does, and for a
    text without references.
    """
    if len(references) != len(text):
        raise UserError(f"references of {len(references)} texts for {len(text)}: give each its own")
    score = clip_score(image, text)
    best = []
    for i, own in enumerate(references):
        if not len(own):
            raise UserError(f"text {i} has no references: give it one, or score without any")
        best.append(_cosines(text[i].expand(len(own), -1), own).max())
    nearest = torch.stack(best).clamp_min(0) if best else score
    total = score + nearest
    return torch.where(total > 0, 2 * score * nearest / total.clamp_min(1e-12), 0)


def summarise(scores: Tensor) -> dict[str, Any]:
    """Mean of (N,) scores, its standard error (deviation over N - 1, by sqrt(N)), the 95 % interval
    mean -+ 1.96 standard errors, and N. The error and interval of a single score are None."""
    n = len(scores)
    if n == 0:
        raise UserError("there are no scores to take the mean of")
    mean = scores.double().mean().item()
    found: dict[str, Any] = {"mean": mean, "standard_error": None, "interval": None, "n": n}
    if n > 1:
        error = scores.double().std().item() / n**0.5
        interval = [mean - WIDTH_95 * error, mean + WIDTH_95 * error]
        found |= {"standard_error": error, "interval": interval}
    return found


def score_images(
    model: CLIP,
    images: Iterable[Sequence[Image] | Tensor],
    texts: Sequence[Texts],
    convention: str = "hessel",
) -> tuple[Tensor, int]:
    """The score (N,) of each image with its text, and how many texts were cut (see `count_cut`).

    images: batches of PIL images or of floats (B, 3, H, W) in [0, 1], N in all, in the order of
    `texts`; of several texts for one image their mean feature counts (see `encode_texts`). Raises
    UserError for other numbers of the two and for an empty text.
    """
    full = texts_for(texts, convention)
    text = encode_texts(model, full)
    image = encode_images(model, images)
    if len(image) != len(text):
        raise UserError(f"{len(image)} images and {len(text)} texts: give each image its own")
    return clip_score(image, text, convention), count_cut(model, full)


def texts_for(texts: Sequence[Texts], convention: str) -> list[list[str]]:
    """The texts as the convention has them, its prefix in front. UserError for an empty one."""
    prefix = pick(CONVENTIONS, convention, "CLIP-score convention").prefix
    each = [several(own) for own in texts]
    for i, own in enumerate(each):
        if not all(text.strip() for text in own):
            raise UserError(f"text {i} is empty: there is nothing to score an image against")
    return [[prefix + text.strip() for text in own] for own in each]


@torch.no_grad()
def encode_images(model: CLIP, images: Iterable[Sequence[Image] | Tensor]) -> Tensor:
    """Unit-length features (N, E) on the CPU of batches of images (see `score_images`)."""
    found = [model.encode_image(model.preprocess(batch)).cpu() for batch in images]
    if not found:
        raise UserError("there are no images to score")
    return torch.cat(found)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """The cosine (N,) of each pair of unit-length (N, E) and (N, E), fp32 or more."""
    if x.ndim != 2 or x.shape != y.shape:
        raise UserError(
            f"features of {tuple(x.shape)} and {tuple(y.shape)} do not belong together: "
            "give as many pairs, of one model"
        )
    cosines = (x * y).sum(1)
    if not cosines.isfinite().all():
        bad = int((~cosines.isfinite()).sum())
        raise UserError(f"features of {bad} of {len(x)} pairs are not finite: look at the weights")
    return cosines
