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
    from maskgit.evaluation.npz import write_npz
    from maskgit.evaluation.processes import Processes
    from maskgit.evaluation.protocol import class_counts
    from maskgit.evaluation.score import score_sets
    from maskgit.evaluation.sets import open_pixels

    processes = Processes()
    args.device = processes.device(args.device)
    ready = options.prepare(args, shared.sampling_settings(args), args.runs)
    pipe, scorer, extractor = ready.pipe, ready.scorer, ready.scorer.extractor
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
    report.save_statistics(args.out / "statistics.npz", scorer.features(sets[0]).gaussian)
    sheets.save(args.out, sets[0], scorer)
    if args.npz:
        write_npz(args.out / "samples.npz", sets[0].batches(64), args.num, pipe.image_size)
    report.print_result(report.finish(args.out, result))
    print(args.out / "metrics.json")
