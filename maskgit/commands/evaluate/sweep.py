"""`maskgit evaluate sweep`: a model's scores over its sampler's settings."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from typing import Any

from maskgit.commands import shared
from maskgit.commands.evaluate import options

HELP = "score a model over steps, schedules and guidance"
EXAMPLE = (
    "maskgit evaluate sweep --reference emoji --extractor emoji --num 256 --steps 1,8 --out sweep"
)


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values of `kind` with commas between them."""

    def split(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    split.__name__ = f"list of {getattr(kind, '__name__', 'values')}"
    return split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_options(parser)
    options.add_scoring_options(parser, "the tables and the plot")
    options.add_generator_options(parser)
    parser.add_argument(
        "--steps",
        type=several(shared.at_least(1)),
        default=[1, 2, 4, 8, 16, 32],
        metavar="N,...",
        help="1,2,4,8,16,32",
    )
    parser.add_argument(
        "--schedule", type=several(str), metavar="NAME,...", help="the model's own, or several"
    )
    parser.add_argument(
        "--guidance", type=several(float), metavar="SCALE,...", help="the model's own, or several"
    )


def run(args: argparse.Namespace) -> None:
    """Check everything, go through the cells, and print table and path."""
    from maskgit.common import UserError
    from maskgit.common.folder import write_json
    from maskgit.evaluation import generate, report
    from maskgit.evaluation.processes import Processes
    from maskgit.evaluation.protocol import title
    from maskgit.evaluation.sweep import Cell, plot, run_cell

    if Processes().count > 1:
        raise UserError("a sweep takes one process: start it without a launcher")
    ready = options.prepare(args, {})
    own, pipe = ready.settings, ready.pipe
    schedules = args.schedule or [own["schedule"]]
    scales = args.guidance if args.guidance is not None else [own["guidance"]]
    cells = [Cell(*cell) for cell in product(args.steps, schedules, scales)]
    generate.check_disk(args.out, args.num * 3 * pipe.image_size[0] * pipe.image_size[1])
    for cell in cells:
        if not cell.file(args.out).exists():
            options.seconds_an_image(ready, asdict(cell))
    plan = {**ready.plan, "metrics": ready.names, **ready.scorer.describe()}
    generate.check_plan(args.out, plan)
    rows = []
    for i, cell in enumerate(cells):
        print(f"cell {i + 1} of {len(cells)}: {cell.name}", flush=True)
        labels, size = ready.labels[0], args.batch_size
        rows.append(
            run_cell(cell, pipe, ready.scorer, ready.names, labels, args.seed, args.out, own, size)
        )
    named = [title(name, ready.scorer.extractor.name, args.num) for name in ("fid", "recall")]
    columns = list(rows[0])
    report.table(columns, [[show(row[name]) for name in columns] for row in rows])
    report.write_csv(args.out / "sweep.csv", rows)
    write_json(args.out / "sweep.json", {"cells": rows, **plan})
    if named[0] in columns:
        plot(args.out / "sweep.png", rows, named[0], named[1] if named[1] in columns else None)
    print(args.out / "sweep.csv")


def show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
