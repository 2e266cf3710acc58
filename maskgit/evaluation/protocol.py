"""What a number may be called, from how many images it may be computed, and what it compares with.

A Frechet distance is FID only on the features of the Inception network of 2015, and FID-50K only
of 50,000 images; other people's FID-50K of ImageNet compare with it only where all that the ADM
evaluator (Dhariwal and Nichol 2021) fixes is the same.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from maskgit.common import UserError, pick
from maskgit.evaluation.metrics import KID_SIZE

INCEPTION_SHA256 = "6726825d"  # first digits, of the port that torch-fidelity publishes
# Published CLIPs, by their recipes' names, and the numbers that other people make with them.
CLIP_FID = "clip-ViT-B-32-openai"  # the extractor of clean-fid's
CMMD = "clip-ViT-L-14-336-openai"  # of Jayasumana et al. 2024
CLIPSCORE = "ViT-B-32/openai"  # the model of Hessel et al. 2021
SPLITS = 10  # of the Inception Score
LEAST_NEIGHBOURHOOD = 100  # images; fewer are no manifold to look for neighbours in

METRICS = {
    "fid": "Frechet distance to the reference",
    "fid-infinity": "the same, extrapolated to infinitely many images",
    "is": "Inception Score",
    "kid": "kernel distance to the reference",
    "cmmd": "kernel distance to the reference on a CLIP's features of unit length",
    "pr": "precision and recall",
    "dc": "density and coverage",
    "accuracy": "share of images that the extractor's classifier puts into their class",
    "nearest": "distance to the nearest image of the reference",
}


def least_images(metric: str, dim: int, classes: int | None) -> int:
    """How many images of each set `metric` needs, with features of width `dim`.

    A covariance of fewer than dim + 1 images is singular; a split of the Inception Score that is
    smaller than the number of classes cannot show them all.
    """
    return {
        "fid": dim + 1,
        "fid-infinity": 2 * (dim + 1),
        "is": SPLITS * (classes or 0),
        "kid": KID_SIZE,
        "cmmd": LEAST_NEIGHBOURHOOD,
        "pr": LEAST_NEIGHBOURHOOD,
        "dc": LEAST_NEIGHBOURHOOD,
    }.get(metric, 1)


def choose(
    asked: Sequence[str] | None,
    fake: int,
    real: int,
    dim: int,
    classes: int | None,
    lacking: dict[str, str],
    statistics: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """The metrics to compute, and why others are left out: name -> reason.

    fake, real: the images of each set. dim, classes: widths of the extractor's features and
    logits. lacking: why a metric cannot be had for want of something else than images.
    statistics: whether the reference's are given, whatever images it has beside them. Raises
    UserError for one that was asked for by name and cannot be had.
    """
    left = dict(lacking)
    alone = {"is", "accuracy"} | ({"fid", "fid-infinity"} if statistics else set())
    for name in METRICS:
        needed = least_images(name, dim, classes)
        few = fake if name in alone else min(fake, real)
        if name not in left and few < needed:
            left[name] = f"needs {needed:,} images, and there are {few:,}"
    for name in asked or ():
        pick(METRICS, name, "metric")
        if name in left:
            raise UserError(f"--metrics {name}: {left[name]}; leave it out")
    return (list(asked), {}) if asked else ([name for name in METRICS if name not in left], left)


def title(metric: str, extractor: str, count: int) -> str:
    """What the number is called in tables and files."""
    inception = extractor == "inception"
    if metric == "fid" and inception:
        return "FID-50K" if count == 50_000 else f"FID ({count:,} images)"
    if (metric, extractor) == ("fid", CLIP_FID):
        return f"CLIP-FID ({count:,} images)"
    if (metric, extractor) == ("cmmd", CMMD):
        return f"CMMD ({count:,} images)"
    base = {
        "fid": "FD",
        "fid-infinity": "FID-infinity" if inception else "FD-infinity",
        "is": "Inception Score" if inception else "IS",
        "kid": "KID" if inception else "KD",
        "cmmd": "CMMD",
    }.get(metric, metric)
    return base if inception else f"{base}-{extractor}"


def clip_name(recipe: str) -> str:
    """What a CLIP is called as an extractor, by its recipe's name ("" for one that has none)."""
    return f"clip-{recipe.replace('/', '-')}" if recipe else "clip"


def is_clip(extractor: str) -> bool:
    """Whether `clip_name` gave an extractor its name."""
    return extractor.split("-")[0] == "clip"


def judge(result: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The protocol's name if all its conditions hold, else None; and the reasons why not.

    `result` is what `metrics.json` holds. A tokenizer's rFID is between reconstructions and the
    same crops of 50,000 images; which these are, the reader has to look up in `reference`.
    """
    if result["command"] == "clip-score":
        return _judge_clip_score(result)
    fake, real, extractor = result["images"], result["reference"], result["extractor"]
    reasons = []
    if fake["count"] != 50_000:
        reasons.append(f"n={fake['count']:,}")
    if extractor["name"] != "inception":
        reasons.append(f"extractor {extractor['name']}")
    elif not extractor["sha256"].startswith(INCEPTION_SHA256):
        reasons.append("Inception weights of another hash")
    if extractor["tf32"]:
        reasons.append("TF32")
    if result["command"] == "tokenizer":
        if fake["resized"]:
            reasons.append("crops and scales of its own, not the ADM evaluator's")
        return (None, reasons) if reasons else (f"rfid-50k@{fake['size'][0]}", [])
    if real["kind"] != "adm" or real["count"] != 10_000:
        reasons.append(f"reference {real['name']} is not the ADM evaluator's")
    if result["command"] == "images":
        reasons.append("how the images became bytes is not known")
    for name, some in (("images", fake), ("reference", real)):
        if some.get("resized"):
            reasons.append(f"resized {name}")
        if some.get("jpeg"):
            reasons.append(f"JPEG files in the {name}")
    classes = result["class_counts"]
    if classes is None:
        reasons.append("classes unknown")
    elif len(classes) != 1000:
        reasons.append(f"{len(classes)} classes")
    elif result["labels"] not in ("balanced", "random"):
        reasons.append(f"labels {result['labels']}")
    return (None, reasons) if reasons else (f"adm-50k@{fake['size'][0]}", [])


def _judge_clip_score(result: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The conditions of Hessel et al. 2021; the other conventions fix no model."""
    reasons, model, how = [], result["extractor"]["name"], result["clip_score"]
    if how["convention"] != "hessel":
        reasons.append(f"convention {how['convention']}, which fixes no model, of {model}")
    elif model != CLIPSCORE:
        reasons.append(f"model {model} is not {CLIPSCORE}")
    if how["texts"]["kind"] != "captions":
        reasons.append(f"{how['texts']['kind']}, no captions")
    if how["truncated"]:
        reasons.append(f"{how['truncated']:,} texts cut")
    if how["not_independent"]:
        reasons.append(how["not_independent"])
    return (None, reasons) if reasons else ("clipscore-hessel", [])


def verdict(result: dict[str, Any]) -> str:
    """The line about comparability that stands under every table."""
    if result["protocol"]:
        return f"protocol {result['protocol']}: comparable to numbers made under it"
    return "NOT COMPARABLE: " + "; ".join(result["not_comparable"])


def apart(results: Sequence[dict[str, Any]]) -> list[str]:
    """What makes several results incomparable with each other, one line each."""
    looked_at = {
        "command": ("command",),
        "extractor": ("extractor", "sha256"),
        "reference": ("reference", "hash"),
        "reference's size": ("reference", "size"),
        "images": ("images", "count"),
        "size of the images": ("images", "size"),
        "resized images": ("images", "resized"),
        "JPEG files": ("images", "jpeg"),
        "labels": ("labels",),
        "images of each class": ("class_counts",),
        "dtype": ("dtype",),
        "TF32": ("extractor", "tf32"),
        "recipe": ("extractor", "recipe"),
        "convention": ("clip_score", "convention"),
        "texts": ("clip_score", "texts"),
        "CLIP": ("clip_score", "model", "sha256"),
        "names of classes": ("clip", "names"),
        "templates": ("clip", "templates"),
    }
    lines = []
    for name, path in looked_at.items():
        values = []
        for result in results:
            value: Any = result
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            values.append(str(value))
        if len(set(values)) > 1:
            lines.append(f"{name}: {', '.join(value[:24] for value in values)}")
    return lines


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """`count` divided by `weights`: largest remainders first, of equal ones the lower number."""
    total = sum(weights)
    exact = [count * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    rest = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in rest[: count - sum(counts)]:
        counts[i] += 1
    return counts


def class_counts(labels: Sequence[int | None]) -> dict[str, int] | None:
    """Images of each class, by its number; None where no image has a class."""
    known = Counter(str(label) for label in labels if label is not None and label >= 0)
    return dict(sorted(known.items(), key=lambda pair: int(pair[0]))) or None
