"""`python -m benchmarks`: every benchmark, its table printed and kept in out/benchmarks/."""

import sys
from pathlib import Path

from benchmarks import evaluation, training
from maskgit.common.folder import write_json
from maskgit.evaluation.report import environment

BENCHMARKS = {"evaluation": evaluation.run, "training": training.run}


def main(names: list[str]) -> None:
    for name in names or BENCHMARKS:
        out = Path("out/benchmarks")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{name}.json", {"rows": BENCHMARKS[name](), **environment()})
        print(out / f"{name}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
