"""`maskgit evaluate clip`: what a CLIP knows of classes and captions."""

import argparse
from pathlib import Path

from maskgit.commands import shared
from maskgit.commands.evaluate import options
from maskgit.commands.evaluate.sweep import several

HELP = "measure a CLIP: zero-shot, retrieval, probes"
EXAMPLE = "maskgit evaluate clip --data emoji:heldout --out clip-measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clip", default="emoji", metavar="MODEL", help="folder, file, hub id or bundled (emoji)"
    )
    parser.add_argument(
        "--data", required=True, metavar="SET", help="image folder, shards, emoji or emoji:heldout"
    )
    parser.add_argument(
        "--train",
        metavar="SET",
        help="labelled images that probes are fitted on (emoji for emoji:heldout)",
    )
    parser.add_argument(
        "--task",
        type=several(str),
        metavar="NAME,...",
        help="zero-shot, retrieval, probe, few-shot (all that the data allow)",
    )
    parser.add_argument(
        "--names",
        metavar="FILE",
        help="of the classes, a line each or JSON, or imagenet (the classes' own)",
    )
    parser.add_argument(
        "--templates",
        metavar="FILE",
        help="prompts with {}, a line each, or imagenet (80), imagenet7 (default)",
    )
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help=".json, .jsonl, .csv or .tsv, joined by id (what lies beside the images)",
    )
    parser.add_argument(
        "--shots",
        type=several(shared.at_least(1)),
        default=[1, 2, 4, 8, 16],
        metavar="N,...",
        help="images a class of few-shot probes (1,2,4,8,16)",
    )
    parser.add_argument(
        "--seed", type=shared.at_least(0), default=0, help="of splits and few-shot draws (0)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    options.add_out_option(parser, "metrics.json, few_shot.png and features")


def run(args: argparse.Namespace) -> None:
    """Check all that will be needed, measure, and print the tables and, last, the path."""
    from maskgit.common.device import pick_device
    from maskgit.common.folder import FORMAT_VERSION, file_hash, write_json
    from maskgit.evaluation import clip_tasks, report
    from maskgit.evaluation.clip_inputs import resolve
    from maskgit.evaluation.clip_model import open_clip_model
    from maskgit.evaluation.protocol import class_counts

    shared.check_writable(args.out / "metrics.json")
    device = pick_device(args.device)
    clip = open_clip_model(args.clip, device)
    options.say("clip", f"{clip.name}, sha256 {clip.sha256}")
    inputs = resolve(args.data, args.train, args.task, args.names, args.templates, args.captions)
    cut = clip_tasks.truncated(clip, inputs)
    tasks, data, train = inputs.tasks, inputs.data, inputs.train
    options.say("data", f"{data.name}: {len(data.items):,} images, {len(inputs.names):,} classes")
    if train:
        options.say("train", f"{train.name}: {len(train.items):,} images")
    shots: list[int] = []
    left = dict(inputs.left_out)
    if "few-shot" in tasks:
        shots, skipped = clip_tasks.usable_shots(inputs, args.shots)
        left |= skipped
    options.say_metrics(tasks, left)
    args.out.mkdir(parents=True, exist_ok=True)

    ways = list(inputs.ways)
    images = clip_tasks.features_of(clip, data, args.out / "features")
    fitted = clip_tasks.features_of(clip, train, args.out / "features") if train else images
    metrics: clip_tasks.Metrics = {}
    how: dict = {"model": clip.describe(), "truncated": cut, "seed": args.seed}
    if inputs.needs_prompts:
        metrics |= clip_tasks.measure_zero_shot(clip, inputs, images)
        how["names"] = inputs.names
        how["templates"] = {way: prompts.templates for way, prompts in inputs.ways.items()}
        how["published_top1"] = clip_tasks.expected(clip, inputs)
    if "retrieval" in tasks:
        metrics |= clip_tasks.measure_retrieval(clip, inputs, images)
        how["captions"] = {"count": sum(map(len, inputs.captions))}
        if args.captions:
            how["captions"]["sha256"] = file_hash(args.captions.expanduser())
    if "probe" in tasks:
        found, how["probe"] = clip_tasks.measure_probe(clip, inputs, images, fitted, args.seed)
        metrics |= found
    if shots:
        metrics |= clip_tasks.measure_few_shot(clip, inputs, images, fitted, shots, args.seed)
        clip_tasks.plot_shots(args.out / "few_shot.png", metrics, ways[-1], shots)

    result = {
        "format_version": FORMAT_VERSION,
        "command": "clip",
        "tasks": tasks,
        "metrics": metrics,
        "left_out": left,
        "clip": how,
        "images": data.describe(),
        "reference": train.describe() if train else None,
        "extractor": {"name": clip.name, "sha256": clip.sha256, "tf32": False},
        "class_counts": class_counts([item.label for item in data.items]),
        "labels": "own",
        "device": str(device),
        "dtype": "fp32",
        **report.environment(),
    }
    write_json(args.out / "metrics.json", result)
    if inputs.needs_prompts:
        clip_tasks.print_zero_shot(metrics, ways)
        if how["published_top1"] is not None:
            print(f"published, ImageNet with 80 templates: top-1 {how['published_top1']:.3f}")
    if "retrieval" in tasks:
        clip_tasks.print_retrieval(metrics)
    if inputs.needs_prompts and train:
        clip_tasks.print_shots(metrics, ways[-1], shots)
    elif "probe" in tasks:
        print(f"probe top-1: {clip_tasks.show(metrics['probe top-1'])}")
    if cut:
        print(f"{cut:,} texts are longer than the model takes: their ends were cut")
    if shots:
        print(args.out / "few_shot.png")
    print(args.out / "metrics.json")
