"""What the subcommands of `maskgit evaluate` have in common."""

import argparse
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.commands import shared

if TYPE_CHECKING:
    from maskgit.evaluation.extractors import Extractor
    from maskgit.evaluation.score import Scorer
    from maskgit.pipeline import Pipeline


def add_scoring_options(parser: argparse.ArgumentParser, sheets: str) -> None:
    """What is compared with, by what, and where the results go."""
    parser.add_argument(
        "--reference",
        required=True,
        metavar="REF",
        help="folder, shards, .npz of images or of statistics, emoji or emoji:heldout",
    )
    add_extractor_options(parser)
    parser.add_argument(
        "--classifier",
        metavar="NAME",
        help="what tells classes, if not the extractor: emoji, or a folder",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,...",
        type=lambda text: text.split(","),
        help="fid, fid-infinity, is, kid, cmmd, pr, dc, accuracy, nearest (all that can be had)",
    )
    add_out_option(parser, sheets)


def add_out_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation"), help=f"a folder for {what} (evaluation)"
    )


def add_extractor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--extractor",
        default="inception",
        help="inception (default), emoji, clip (the bundled ones), clip:MODEL, or a folder that "
        "`maskgit train emoji_classifier` made",
    )
    parser.add_argument(
        "--extractor-weights", type=Path, metavar="FILE", help="where Inception weights are"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="let GPUs round its products: faster, not comparable"
    )


def extractor_of(args: argparse.Namespace) -> "Extractor":
    """The extractor that the options name; says which weights it found. Checks --out as well."""
    from maskgit.common.device import pick_device
    from maskgit.evaluation.extractors import open_extractor

    shared.check_writable(args.out / "metrics.json")
    device, weights = pick_device(args.device), args.extractor_weights
    extractor = open_extractor(args.extractor, device, weights, args.tf32)
    say("extractor", f"{extractor.name}, sha256 {extractor.sha256}")
    return extractor


def open_scorer(
    args: argparse.Namespace, extractor: "Extractor", size: tuple[int, int]
) -> "Scorer":
    """A scorer against the reference of the options, its images brought to `size`."""
    from maskgit.evaluation.extractors import open_extractor
    from maskgit.evaluation.score import Scorer
    from maskgit.evaluation.sets import StatisticsFile, open_set

    reference = open_set(args.reference, size)
    classifier = None
    if args.classifier:
        classifier = open_extractor(args.classifier, extractor.device, None, args.tf32)
    scorer = Scorer(extractor, reference, args.out / "features", classifier)
    kind = "statistics" if isinstance(reference, StatisticsFile) else f"{len(reference):,} images"
    say("reference", f"{reference.name}: {kind}, sha256 {reference.hash}")
    return scorer


@dataclass
class Prepared:
    """All that drawing and scoring a model needs."""

    pipe: "Pipeline"
    scorer: "Scorer"
    names: list[str]  # of metrics
    left_out: dict[str, str]
    labels: list[list[int | None]]  # of each run, the class of each image
    settings: dict[str, Any]  # of the sampler
    plan: dict[str, Any]  # what the images of the output folder are drawn by


def add_generator_options(parser: argparse.ArgumentParser) -> None:
    """How many images of which classes and seeds."""
    parser.add_argument(
        "--num", type=shared.at_least(1), default=50_000, help="images a score (50000)"
    )
    parser.add_argument(
        "--labels", default="balanced", help="balanced (default), random, reference, or a file"
    )
    parser.add_argument(
        "--seed", type=shared.at_least(0), default=0, help="of the first image; +1 for each (0)"
    )
    parser.add_argument("--batch-size", type=shared.at_least(1), default=64, help="at once (64)")


def prepare(args: argparse.Namespace, settings: dict[str, Any], runs: int = 1) -> Prepared:
    """Find and check all that will be needed, and say it. settings: of the sampler, as options
    give them."""
    from maskgit.evaluation import generate

    extractor = extractor_of(args)
    pipe = shared.load_pipeline(args)
    scorer = open_scorer(args, extractor, pipe.image_size)
    names, left = scorer.choose(args.metrics, args.num, pipe.labels)
    known: list[int | None] = []
    if args.labels == "reference" and scorer.images is not None:
        known = generate.reference_labels(scorer.images, pipe.labels)
    labels = [
        generate.choose_labels(args.labels, args.num, pipe.labels, known, args.seed + k * args.num)
        for k in range(runs)
    ]
    plan = {
        "num": args.num,
        "labels": args.labels,
        "first labels": hashlib.sha256(str(labels[0]).encode()).hexdigest(),
        "seed": args.seed,
        "settings": pipe.settings(settings),
        "model": shared.model_hashes(args.model),
        **shared.computed_on(pipe),
        "device": pipe.device.type,  # which of several GPUs draws an image does not matter
    }
    say_metrics(names, left)
    return Prepared(pipe, scorer, names, left, labels, plan["settings"], plan)


def seconds_an_image(ready: Prepared, settings: dict[str, Any]) -> tuple[float, float]:
    """What drawing and what scoring take, by doing it with a few images for nothing, which also
    raises now what would fail later."""
    few = ready.labels[0][:4]
    start = time.monotonic()
    images = ready.pipe.sample(few, **ready.settings | settings)
    drawn = time.monotonic()
    ready.scorer.extractor((images * 255).round().byte())[0].sum().item()
    return (drawn - start) / len(few), (time.monotonic() - drawn) / len(few)


def say_metrics(names: list[str], left: dict[str, str]) -> None:
    say("metrics", ", ".join(names))
    for name, reason in left.items():
        say("left out", f"{name}: {reason}")


def say(what: str, text: str) -> None:
    """One line of what was resolved before the work, by the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{what:<10} {text}", flush=True)
