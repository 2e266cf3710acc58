"""The numbers of a set of images against a reference, from the features of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskgit.common import UserError
from maskgit.evaluation import metrics
from maskgit.evaluation.extractors import Extractor, Features, cached_features
from maskgit.evaluation.protocol import SPLITS, choose, is_clip, title
from maskgit.evaluation.sets import PixelSet, StatisticsFile
from maskgit.evaluation.statistics import frechet, frechet_infinity

QUANTILES = (5, 25, 50, 75, 95)  # per cent, of the distances to the nearest image
Value = dict[str, Any]  # `value`, where there is one `deviation` and `over` what, and details


@dataclass
class Reference:
    """What images are compared with: Gaussian statistics, and features where there are images."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64
    features: Tensor | None  # (M, D) float32


class Scorer:
    """Scores sets of images against one reference, whose features it computes once.

    cache: the folder that keeps the features of the sets, by the hash of what they were computed
    from; those of the reference are kept in the user's cache, for other runs as well. classifier:
    what tells classes, if not the extractor.
    """

    def __init__(
        self,
        extractor: Extractor,
        reference: PixelSet | StatisticsFile,
        cache: Path,
        classifier: Extractor | None = None,
    ) -> None:
        self.extractor, self.given, self.cache = extractor, reference, cache
        self.classifier = classifier or extractor
        self.images = reference.images if isinstance(reference, StatisticsFile) else reference
        if isinstance(reference, StatisticsFile) and len(reference.mean) != extractor.dim:
            raise UserError(
                f"{reference.name} has statistics of {len(reference.mean)} features, and the "
                f"extractor {extractor.name} makes {extractor.dim}: take the one it was made with"
            )
        self._reference: Reference | None = None
        self._features: tuple[str, Features] | None = None  # of the set that was asked for last
        self._nearest: tuple[str, tuple[Tensor, Tensor]] | None = None  # likewise

    def choose(
        self, asked: Sequence[str] | None, count: int, classes: Sequence[str]
    ) -> tuple[list[str], dict[str, str]]:
        """The metrics for `count` images of `classes`, and why others are left out."""
        lacking = {}
        if self.images is None:
            for name in ("kid", "cmmd", "pr", "dc", "nearest"):
                lacking[name] = "the reference has statistics alone, no images"
        if not is_clip(self.extractor.name):
            lacking["cmmd"] = "the extractor is no CLIP: take --extractor clip"
        if not self.extractor.logit_dim:
            lacking["is"] = "the extractor has no classes"
        if not classes or self.classifier.classes != list(classes):
            lacking["accuracy"] = f"{self.classifier.name} does not tell the images' classes"
        real = len(self.images) if self.images is not None else count
        dim, logits = self.extractor.dim, self.extractor.logit_dim
        given = isinstance(self.given, StatisticsFile)
        return choose(asked, count, real, dim, logits, lacking, given)

    def reference(self) -> Reference:
        """The reference's statistics and features. A statistics file's own statistics come first:
        its images, where it has any, are a part of what they were computed from."""
        if self._reference is None:
            images = self.images
            found = cached_features(self.extractor, images) if images is not None else None
            own = self.given if isinstance(self.given, StatisticsFile) else None
            gaussian: Any = own or (found and found.gaussian)
            features = found.features if found else None
            self._reference = Reference(gaussian.mean, gaussian.covariance, features)
        return self._reference

    def features(self, images: PixelSet) -> Features:
        """What the extractor makes of a set; of the last set, without reading it again."""
        if self._features is None or self._features[0] != images.hash:
            self._features = images.hash, cached_features(self.extractor, images, self.cache)
        return self._features[1]

    def nearest(self, images: PixelSet) -> tuple[Tensor, Tensor]:
        """For each image the distance (N,) to the nearest of the reference, and its row (N,)."""
        if self._nearest is None or self._nearest[0] != images.hash:
            real = _required(self.reference().features)
            found = metrics.nearest(self.features(images).features, real)
            self._nearest = images.hash, found
        return self._nearest[1]

    def accuracy(self, images: PixelSet, labels: Sequence[int | None]) -> float:
        """Share of `images` that the classifier puts into the class of their label."""
        own = self.classifier is self.extractor
        found = (
            self.features(images) if own else cached_features(self.classifier, images, self.cache)
        )
        return metrics.accuracy(_required(found.logits), torch.tensor(labels))

    def describe(self) -> dict[str, Any]:
        """Extractor and reference, as they stand in metrics.json."""
        given, images = self.given, self.images
        none = {"count": None, "size": None}
        reference = describe_set(images) if images is not None else none
        if isinstance(given, StatisticsFile):
            kind = "statistics" if images is None else "adm"
            reference |= {"name": given.name, "hash": given.hash, "kind": kind}
        networks = {"extractor": self.extractor, "classifier": self.classifier}
        return {"reference": reference, **{k: describe_extractor(v) for k, v in networks.items()}}


def describe_set(images: PixelSet) -> dict[str, Any]:
    """What of a set of images bears on comparability."""
    return {
        "name": images.name,
        "kind": images.kind,
        "hash": images.hash,
        "count": len(images),
        "size": list(images.size),
        "resized": images.resized,
        "jpeg": images.jpeg,
    }


def describe_extractor(extractor: Extractor) -> dict[str, Any]:
    about = {"name": extractor.name, "sha256": extractor.sha256, "tf32": extractor.tf32}
    return about | ({"recipe": extractor.recipe} if extractor.recipe else {})


def score(
    names: Sequence[str], scorer: Scorer, images: PixelSet, labels: Sequence[int | None]
) -> dict[str, Value]:
    """The metrics `names` of `protocol.METRICS`, by the names that they deserve.

    labels: the class of each image, for the accuracy of the classifier.
    """
    fake, real, extractor = scorer.features(images), scorer.reference(), scorer.extractor.name
    values: dict[str, Value] = {}
    for name in names:
        if name == "accuracy":
            values[f"accuracy-{scorer.classifier.name}"] = {
                "value": scorer.accuracy(images, labels)
            }
            continue
        if name == "nearest":
            values[title("nearest distance", extractor, fake.count)] = spread(
                scorer.nearest(images)[0]
            )
            continue
        for part, value in _compute(name, fake, real).items():
            values[title(part, extractor, fake.count)] = value
    return values


def _compute(name: str, fake: Features, real: Reference, seed: int = 0) -> dict[str, Value]:
    """One metric, or the pair that it stands for; `seed`: of the subsets and splits drawn."""
    if name == "fid":
        gaussian = fake.gaussian
        value = frechet(gaussian.mean, gaussian.covariance, real.mean, real.covariance)
        return {name: {"value": value}}
    if name == "fid-infinity":
        value, points = frechet_infinity(fake.features, (real.mean, real.covariance), seed=seed)
        return {name: {"value": value, "fit": points}}
    if name == "is":
        order = np.random.RandomState(seed).permutation(fake.count)
        mean, deviation = metrics.inception_score(
            _required(fake.logits), SPLITS, torch.tensor(order)
        )
        return {name: {"value": mean, "deviation": deviation, "over": f"{SPLITS} splits"}}
    features = _required(real.features)
    if name == "kid":
        mean, deviation = metrics.kid(fake.features, features, seed=seed)
        over = f"{metrics.KID_SUBSETS} subsets of {metrics.KID_SIZE:,}"
        return {name: {"value": mean, "deviation": deviation, "over": over}}
    if name == "cmmd":
        return {name: {"value": metrics.cmmd(fake.features, features)}}
    if name == "pr":
        pair = metrics.precision_recall(features, fake.features)
        return {part: {"value": v} for part, v in zip(("precision", "recall"), pair, strict=True)}
    if name == "dc":
        pair = metrics.density_coverage(features, fake.features)
        return {part: {"value": v} for part, v in zip(("density", "coverage"), pair, strict=True)}
    raise AssertionError(name)  # `protocol.choose` knows no other


def spread(distances: Tensor) -> Value:
    """The median of (N,) distances, and their quantiles."""
    found = np.percentile(distances.numpy(), QUANTILES).tolist()
    quantiles = {f"{q} %": value for q, value in zip(QUANTILES, found, strict=True)}
    return {"value": quantiles["50 %"], "quantiles": quantiles}


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # `protocol.choose` leaves out what lacks it
    return tensor


def score_sets(
    scorer: Scorer,
    names: Sequence[str],
    sets: Sequence[PixelSet],
    labels: Sequence[Sequence[int | None]],
) -> dict[str, Any]:
    """The metrics `names` over one or several sets of equal make, and what the sets are.

    labels: of each set, the class of each image.
    """
    runs = [score(names, scorer, *one) for one in zip(sets, labels, strict=True)]
    return {"metrics": over_runs(runs), "images": {**describe_set(sets[0]), "runs": len(sets)}}


def over_runs(runs: Sequence[dict[str, Value]]) -> dict[str, Value]:
    """The mean of several runs, and their deviation (not the least of them)."""
    if len(runs) == 1:
        return runs[0]
    combined = {}
    for name in runs[0]:
        values = [run[name]["value"] for run in runs]
        combined[name] = {
            "value": float(np.mean(values)),
            "deviation": float(np.std(values, ddof=1)),
            "over": f"{len(runs)} runs",
            "runs": values,
        }
    return combined
