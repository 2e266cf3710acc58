"""Several candidates for each image, of which the one that goes best with its class is kept.

Candidate c of image i has the seed s + i C + c, for C candidates and a first seed s: images share
no candidates, and the seed of the one that was kept draws it again, alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clip.score import clip_score, encode_images
from clip.texts import Texts, encode_texts
from maskgit.common import UserError
from maskgit.evaluation.clip_model import ClipModel
from maskgit.evaluation.extractors import precision
from maskgit.evaluation.prompts import class_texts
from maskgit.pipeline import Pipeline


@dataclass(eq=False)
class Kept:
    """The best candidate of an image."""

    image: Tensor  # (3, H, W) in [0, 1]
    seed: int  # its own
    score: float  # cosine between it and its prompts' mean feature
    prompt: Texts  # what its class is called

    def record(self, clip: ClipModel, candidates: int) -> dict[str, Any]:
        """What the image's metadata say of how it was chosen."""
        return {
            "model": clip.name,
            "sha256": clip.sha256,
            "prompt": self.prompt,
            "cosine": self.score,
            "candidates": candidates,
        }


def rerank(
    pipe: Pipeline,
    clip: ClipModel,
    labels: Sequence[int | None],
    candidates: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    **settings: Any,
) -> Iterator[Kept]:
    """The best of `candidates` for each class of `labels`, by the cosine of CLIP features with the
    class's name; of equal ones the first. `settings` and `batch_size` as `Pipeline.sample` has
    them. Raises UserError for an image of no class, before any is drawn.
    """
    if any(label is None for label in labels):
        raise UserError("images of no class have nothing to be reranked by: leave --rerank out")
    known = class_texts(pipe.labels)
    prompts = [known[label] for label in labels if label is not None]
    texts = encode_texts(clip.model, prompts)  # (N, E)
    at_once = max(1, batch_size // candidates)  # images whose candidates are drawn together
    for start in range(0, len(labels), at_once):
        rows = range(start, min(start + at_once, len(labels)))
        seeds = [seed + i * candidates + c for i in rows for c in range(candidates)]
        repeated = [labels[i] for i in rows for _ in range(candidates)]
        images = pipe.sample(repeated, seed=seeds, batch_size=batch_size, **settings)
        # Scored as they will be in a file: another who scores that one finds the same.
        with precision("ieee"):
            features = encode_images(clip.model, ((images * 255).round() / 255).split(batch_size))
        text = texts[rows.start : rows.stop].repeat_interleave(candidates, 0)
        scores = clip_score(features, text, "cosine").view(len(rows), candidates)
        for k, best in enumerate(scores.argmax(1).tolist()):
            at = k * candidates + best
            yield Kept(images[at], seeds[at], scores[k, best].item(), prompts[start + k])
