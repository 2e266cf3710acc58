"""`maskgit evaluate generator`: sample a model and score what it makes, in one go."""

import argparse

from maskgit.commands import shared
from maskgit.commands.evaluate import options

HELP = "sample a model and score its images"
EXAMPLE = "maskgit evaluate generator --reference emoji --extractor emoji --num 256 --out generator"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_options(parser)
    options.add_scoring_options(parser, "the images, sheets and metrics.json")
    options.add_generator_options(parser)
    parser.add_argument("--runs", type=shared.at_least(1), default=1, help="that share no seed (1)")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz, as ADM has it")
    shared.add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check all that will be needed, draw what is missing, score, and print the path."""
    from maskgit.common.progress import clock
    from maskgit.evaluation import generate, report, sheets
    from maskgit.evaluation.processes import Processes
    from maskgit.evaluation.protocol import class_counts
    from maskgit.evaluation.score import score_sets
    from maskgit.evaluation.sets import open_pixels, write_npz

    total = args.num * args.runs
    ready = options.prepare(args, total, shared.sampling_settings(args))
    pipe, scorer, labels = ready.pipe, ready.scorer, ready.labels
    processes = Processes()
    seconds = options.try_out(ready, {}) * total / processes.count
    options.say("drawing", f"takes about {clock(seconds)} or less")
    runs = [args.out / "images" / f"run-{k}" for k in range(args.runs)]
    for k, folder in enumerate(runs):
        seed = args.seed + k * args.num
        share = (processes.index, processes.count)
        generate.draw(pipe, labels, seed, folder, ready.settings, args.batch_size, share)
    processes.wait()
    if not processes.first:
        return
    for folder in runs:
        generate.check_complete(folder, args.num)
    sets = [open_pixels(str(folder)) for folder in runs]
    result = {
        "command": "generator",
        **score_sets(scorer, ready.names, sets, labels),
        **scorer.describe(),
        "left_out": ready.left_out,
        "labels": args.labels,
        "class_counts": class_counts(labels),
        "seeds": [args.seed, args.seed + total - 1],
        "settings": ready.settings,
        "model": {"source": args.model, "sha256": ready.plan["model"]},
        "averaged_weights": shared.averaged(args.model),
        **shared.computed_on(pipe),
    }
    report.save_statistics(args.out / "statistics.npz", scorer.features(sets[0]).gaussian)
    sheets.save(args.out, sets[0], scorer)
    if args.npz:
        write_npz(args.out / "samples.npz", sets[0].batches(64), args.num, pipe.image_size)
    report.print_result(report.finish(args.out, result))
    print(args.out / "metrics.json")
