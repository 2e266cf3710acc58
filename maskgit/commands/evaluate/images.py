"""`maskgit evaluate images`: score images that anyone made."""

import argparse

from maskgit.commands import shared
from maskgit.commands.evaluate import options

HELP = "score images that anyone made"
EXAMPLE = "maskgit evaluate images emoji:heldout --reference emoji --extractor emoji --out images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", help="folder, shards, .npz of images, emoji or emoji:heldout")
    parser.add_argument(
        "--size", type=shared.at_least(16), help="crop and resize to this side (as they are)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    options.add_scoring_options(parser, "the sheets and metrics.json")


def run(args: argparse.Namespace) -> None:
    """Check all that will be needed, score, and print the path."""
    from maskgit.evaluation import report, sheets
    from maskgit.evaluation.protocol import class_counts
    from maskgit.evaluation.score import score_sets
    from maskgit.evaluation.sets import open_pixels

    extractor = options.extractor_of(args)
    images = open_pixels(args.set, (args.size, args.size) if args.size else None)
    scorer = options.open_scorer(args, extractor, images.size)
    names, left = scorer.choose(args.metrics, len(images), images.classes)
    options.say_metrics(names, left)
    result = {
        "command": "images",
        "left_out": left,
        "labels": "own",
        "class_counts": class_counts(images.labels),
        **scorer.describe(),
        "device": str(extractor.device),
        "dtype": "fp32",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    result |= score_sets(scorer, names, [images], [images.labels])
    report.save_statistics(args.out / "statistics.npz", scorer.features(images).gaussian)
    sheets.save(args.out, images, scorer)
    report.print_result(report.finish(args.out, result))
    print(args.out / "metrics.json")
