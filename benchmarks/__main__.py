"""`python -m benchmarks [NAMES] [--full]`: tables, printed and kept in out/benchmarks/.

`python -m benchmarks compare old.json new.json` says what became slower.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import compare
from benchmarks.table import Row, heading, shown
from maskgit.common import UserError, pick
from maskgit.common.device import cpu_abilities, pick_device, pick_dtype
from maskgit.common.folder import write_json
from maskgit.evaluation.report import environment

# What each measures; the first ones are what runs where none is named.
BENCHMARKS = {
    "sampling": "the transformer in 8 steps, against the rate of its products",
    "tokenizer": "tokens to images and back, against the rate of its convolutions",
    "growth": "cost against tokens, steps and batch",
    "startup": "`maskgit sample --num 1`, from the start of the process to the file",
    "training": "a step of each task, and what the loop costs beside it",
    "stages": "many images from end to end, and what time goes where",
    "int8": "products in int8: what they gain, and what they change",
    "shares": "what each part of the fast path gains",
    "evaluation": "reading, scoring and statistics, against the bare network",
}
USUAL = list(BENCHMARKS)[:5]


def main(words: list[str]) -> int:
    """Run the benchmarks named in the command line; its exit status."""
    told = "\n".join(f"  {name:12}{what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{__doc__}\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", default=USUAL, help=f"({' '.join(USUAL)})")
    parser.add_argument("--full", action="store_true", help="larger batches and grids too")
    args = parser.parse_args(words)
    try:
        if args.names[0] == "compare":
            if len(args.names) != 3:
                raise UserError("compare takes two files: python -m benchmarks compare old new")
            return 0 if compare.run(*args.names[1:]) else 1
        for name in args.names:
            pick(BENCHMARKS, name, "benchmark")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = machine()
    print(", ".join(f"{name}: {value}" for name, value in about.items() if name != "versions"))
    for name in args.names:
        print(measured(name, args.full, about))
    return 0


def machine() -> dict[str, Any]:
    """What all of it is measured on."""
    import torch

    dtype = str(pick_dtype("auto", pick_device("auto"))).removeprefix("torch.")
    able = " ".join(name for name, has in cpu_abilities().items() if has)
    return {**environment(), "abilities": able, "threads": torch.get_num_threads(), "dtype": dtype}


def measured(name: str, full: bool, about: dict[str, Any]) -> Path:
    """Run a benchmark, tell each row as it comes, and keep what there is by then; the file."""
    module = import_module(f"benchmarks.{name}")
    file = Path("out/benchmarks", f"{name}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    print(heading(module.COLUMNS), flush=True)
    for row in module.run(full):
        print(shown(row, module.COLUMNS), flush=True)
        rows.append(row)
        write_json(file, {"rows": rows, **about})
    return file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
