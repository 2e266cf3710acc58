"""`maskgit evaluate compare`: results side by side, and what makes them incomparable."""

import argparse
from pathlib import Path

HELP = "show results side by side"
EXAMPLE = "maskgit evaluate compare generator images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, help="metrics.json or their folders")


def run(args: argparse.Namespace) -> None:
    from maskgit.evaluation import report

    report.compare(args.results)
