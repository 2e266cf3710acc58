"""`maskgit evaluate generator`: sample a model and score what it makes, in one go."""

import argparse
from typing import TYPE_CHECKING

from maskgit.commands import shared
from maskgit.commands.evaluate import options

if TYPE_CHECKING:
    from maskgit.evaluation.clip_model import ClipModel

HELP = "sample a model and score its images"
EXAMPLE = "maskgit evaluate generator --reference emoji --extractor emoji --num 256 --out generator"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_options(parser)
    options.add_scoring_options(parser, "the images, sheets and metrics.json")
    options.add_generator_options(parser)
    parser.add_argument("--runs", type=shared.at_least(1), default=1, help="that share no seed (1)")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz, as ADM has it")
    parser.add_argument(
        "--clip-score",
        nargs="?",
        const="emoji",
        metavar="MODEL",
        help="also score class prompts by this CLIP (emoji), as clip-score --labels does",
    )
    shared.add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check all that will be needed, draw what is missing, score, and print the path."""
    from maskgit.common.progress import clock
    from maskgit.evaluation import generate, report, sheets
    from maskgit.evaluation.clip_score import score_set
    from maskgit.evaluation.npz import write_npz
    from maskgit.evaluation.processes import Processes
    from maskgit.evaluation.prompts import class_texts
    from maskgit.evaluation.protocol import class_counts
    from maskgit.evaluation.score import over_runs, score_sets
    from maskgit.evaluation.sets import open_pixels

    processes = Processes()
    args.device = processes.device(args.device)
    ready = options.prepare(args, shared.sampling_settings(args), args.runs)
    pipe, scorer, extractor = ready.pipe, ready.scorer, ready.scorer.extractor
    clip = open_clip(args.clip_score, ready) if args.clip_score else None
    runs = [args.out / "images" / f"run-{k}" for k in range(args.runs)]
    total, image = args.num * args.runs, 3 * pipe.image_size[0] * pipe.image_size[1]
    missing = total - sum(1 for folder in runs for _ in folder.glob("[!.]*.png"))
    needed = (missing + args.num * args.npz) * image  # a PNG is at most about as many bytes
    needed += total * 4 * (extractor.dim + (extractor.logit_dim or 0))
    generate.check_disk(args.out, needed)
    drawing, scoring = options.seconds_an_image(ready, {})
    seconds = drawing * missing / processes.count + scoring * total
    options.say("images", f"{missing:,} of {total:,} to draw, labels {args.labels}")
    options.say("disk", f"at most {needed / 1e6:,.0f} MB more in {args.out}")
    options.say("time", f"about {clock(seconds)} or less for drawing and scoring")
    if processes.first:
        generate.check_plan(args.out, ready.plan)
    processes.wait()

    share = (processes.index, processes.count)
    for k, folder in enumerate(runs):
        seed, labels = args.seed + k * args.num, ready.labels[k]
        generate.draw(pipe, labels, seed, folder, ready.settings, args.batch_size, share)
    processes.wait()
    if not processes.first:
        return
    for folder in runs:
        generate.check_complete(folder, args.num)
    sets = [open_pixels(str(folder)) for folder in runs]
    result = {
        "command": "generator",
        **score_sets(scorer, ready.names, sets, ready.labels),
        **scorer.describe(),
        "left_out": ready.left_out,
        "labels": args.labels,
        "class_counts": class_counts(ready.labels[0]),
        "seeds": [args.seed, args.seed + total - 1],
        "settings": ready.settings,
        "model": {"source": args.model, "sha256": ready.plan["model"]},
        "averaged_weights": shared.averaged(args.model),
        **shared.computed_on(pipe),
    }
    if clip:
        known = class_texts(pipe.labels)
        prompts = [[known[i] for i in one if i is not None] for one in ready.labels]
        found = [score_set(clip, *pair) for pair in zip(sets, prompts, strict=True)]
        result["metrics"] |= over_runs([metric for metric, _ in found])
        result["clip_score"] = found[0][1]
    report.save_statistics(args.out / "statistics.npz", scorer.features(sets[0]).gaussian)
    sheets.save(args.out, sets[0], scorer)
    if args.npz:
        write_npz(args.out / "samples.npz", sets[0].batches(64), args.num, pipe.image_size)
    report.print_result(report.finish(args.out, result))
    print(args.out / "metrics.json")


def open_clip(source: str, ready: options.Prepared) -> "ClipModel":
    """The CLIP of --clip-score; UserError where the images have no classes to be scored against."""
    from maskgit.common import UserError
    from maskgit.evaluation.clip_model import open_clip_model

    if any(label is None for labels in ready.labels for label in labels):
        raise UserError("--clip-score: this model has no classes to make prompts of; leave it out")
    clip = open_clip_model(source, ready.pipe.device)
    options.say("clip", f"{clip.name}, sha256 {clip.sha256}")
    return clip
