"""`maskgit train`: any of the models, from a config and `key=value` settings."""

import argparse
import time
from pathlib import Path

from maskgit.common.signals import deadly

HELP = "train a tokenizer, a transformer, a CLIP or a classifier"
EXAMPLE = "maskgit train emoji_vqgan --smoke"

# In the wheel the configs stand inside the package, in a checkout beside it.
CONFIGS = [Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, or the name of one that comes along")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="in place of the config's own, such as run=FOLDER data.path=FOLDER train.steps=100",
    )
    parser.add_argument("--restart", action="store_true", help="begin anew in the run's folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="build, check, try two steps, tell what it takes"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny settings: under a minute")


def run(args: argparse.Namespace) -> int:
    with deadly():
        from maskgit.common.processes import rank
        from maskgit.engine.config import parse_overrides, read_yaml
        from maskgit.engine.loop import Stopped
        from maskgit.joins import start
        from maskgit.runs import resolve

        content = read_yaml(args.config, CONFIGS)
        described, expect = resolve(content, parse_overrides(args.settings), args.smoke)
    if args.dry_run:
        from maskgit.dry_run import dry_run

        dry_run(described)
        return 0
    begun = time.monotonic()
    if args.smoke and expect:
        print(f"expect: {expect}")
    try:
        last = start(described, args.restart)
    except Stopped as stopped:
        if not rank():
            print(stopped)
        return stopped.status
    if rank():
        return 0  # the main process tells
    if last is None:
        print(f"{described.run} has finished its {described.train.steps} steps: nothing to do")
        return 0
    print(f"reached: loss {last['loss']:.3f} in {time.monotonic() - begun:.0f} s")
    print(Path(described.run) / "export")
    return 0
