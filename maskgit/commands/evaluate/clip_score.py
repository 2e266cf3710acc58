"""`maskgit evaluate clip-score`: how well images go with their captions or classes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from maskgit.commands import shared
from maskgit.commands.evaluate import options

HELP = "score images against captions or classes"
EXAMPLE = "maskgit evaluate clip-score emoji:heldout --labels --out clip-score"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", help="image folder, shards, emoji or emoji:heldout")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--captions", type=Path, metavar="FILE", help=".json, .jsonl, .csv or .tsv, joined by id"
    )
    texts.add_argument("--labels", action="store_true", help="prompts of the images' own classes")
    parser.add_argument(
        "--clip", default="emoji", metavar="MODEL", help="folder, file, hub id or bundled (emoji)"
    )
    parser.add_argument(
        "--convention",
        default="hessel",
        help='hessel: 2.5 max(cos, 0), "A photo depicts " in front (default); percent; cosine',
    )
    parser.add_argument(
        "--references", type=Path, metavar="FILE", help="others' captions, for RefCLIPScore"
    )
    parser.add_argument(
        "--template", metavar="TEXT", help='with --labels, such as "a photo of a {}."'
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    options.add_out_option(parser, "scores.csv and metrics.json")


def run(args: argparse.Namespace) -> None:
    """Check all, score, write, and print the numbers and, on the last line, the path."""
    from clip.score import CONVENTIONS
    from clip.texts import Texts, class_prompts, spoken
    from maskgit.common import UserError, pick
    from maskgit.common.device import pick_device
    from maskgit.common.folder import file_hash
    from maskgit.engine.captions import join, read_captions
    from maskgit.evaluation import clip_score, report
    from maskgit.evaluation.clip_model import open_clip_model
    from maskgit.evaluation.protocol import class_counts

    pick(CONVENTIONS, args.convention, "CLIP-score convention")
    if args.template is not None and not args.labels:
        raise UserError("--template is for the names of classes: give it with --labels")
    if args.references and args.convention != "hessel":
        raise UserError("--references: RefCLIPScore is of --convention hessel alone")
    shared.check_writable(args.out / "metrics.json")
    device = pick_device(args.device)
    tables = [table for table in (args.captions, args.references) if table]
    captions = {table: read_captions(table) for table in tables}
    pictures = clip_score.open_pictures(args.set, tables)
    options.say("images", f"{args.set}: {len(pictures.items):,}")
    texts: Sequence[Sequence[Texts]]
    if args.captions:
        texts = join(pictures.items, captions[args.captions], str(args.captions))
    else:
        prompts: Sequence[Texts] = clip_score.prompts_of(pictures)
        if args.template is not None:
            names = map(spoken, clip_score.class_names(pictures))
            prompts = class_prompts(names, [args.template])
        texts = [[own] for own in prompts]  # its several texts count as one
    references = None
    if args.references:
        references = join(pictures.items, captions[args.references], str(args.references))
    clip = open_clip_model(args.clip, device)
    options.say("clip", f"{clip.name}, sha256 {clip.sha256}")

    metrics, how, rows = clip_score.score_pictures(
        clip, pictures, texts, args.convention, references
    )
    how["texts"] = {"kind": "captions" if args.captions else "class prompts"}
    if args.labels:
        how["texts"]["template"] = args.template
    for kind, table in (("captions", args.captions), ("references", args.references)):
        if table:
            how["texts"][f"{kind} sha256"] = file_hash(table.expanduser())
    how["not_independent"] = clip_score.check_independent(pictures, clip)
    result = {
        "command": "clip-score",
        "metrics": metrics,
        "clip_score": how,
        "images": pictures.describe(),
        "reference": None,
        "extractor": {"name": clip.name, "sha256": clip.sha256, "tf32": False},
        "class_counts": class_counts([item.label for item in pictures.items]),
        "labels": "own",
        "device": str(device),
        "dtype": "fp32",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    report.write_csv(args.out / "scores.csv", rows)
    report.print_result(report.finish(args.out, result))
    if how["not_independent"]:
        print(f"NOT INDEPENDENT: {how['not_independent']}")
    if how["truncated"]:
        print(f"{how['truncated']:,} texts are longer than the model takes: their ends were cut")
    print(args.out / "scores.csv")
    print(args.out / "metrics.json")
