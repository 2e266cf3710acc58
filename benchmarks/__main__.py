"""`python -m benchmarks [NAMES] [--full]`: tables, printed and kept in out/benchmarks/.

`python -m benchmarks compare old.json new.json` says what became slower.
"""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import compare
from maskgit.common import UserError, pick
from maskgit.common.folder import write_json
from maskgit.evaluation.report import environment

# What each measures; the first is what runs where none is named.
BENCHMARKS = {
    "sampling": "transformer, tokenizer, start-up, against the machine's rates",
    "shares": "what each part of the fast path gains",
    "evaluation": "reading, scoring and statistics, against the bare network",
    "training": "what the loop costs beside the steps",
}


def main(words: list[str]) -> int:
    """Run the benchmarks named in the command line; its exit status."""
    told = "\n".join(f"  {name:12}{what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{__doc__}\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", default=["sampling"], help="benchmarks (sampling)")
    parser.add_argument("--full", action="store_true", help="larger batches too")
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
    for name in args.names:
        print(write(name, measured(name, args.full)))
    return 0


def measured(name: str, full: bool) -> list[dict[str, Any]]:
    run: Callable[..., list[dict[str, Any]]] = import_module(f"benchmarks.{name}").run
    return run(full) if name in ("sampling", "shares") else run()


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Keep the rows, and on what they were measured; the file's path."""
    import torch

    file = Path("out/benchmarks", f"{name}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"rows": rows, "threads": torch.get_num_threads(), **environment()})
    return file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
