"""`maskgit sample --num 1` from the start of the process to the file, and where the time goes.

Run as a program, it is such a process, which tells its stages: seconds since it was started.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.table import TIMES, Row

STAGES = ("python and the command", "imports", "weights", "network", "PNG")
END = "the end of the process, after it"


COLUMNS = TIMES


def run(full: bool = False, repeats: int = 5) -> list[Row]:
    """A row for the whole, to the file; one for each stage; and one for what comes after it."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [one_run(Path(folder, f"{i}.png")) for i in range(repeats + 1)][1:]  # disk warm
    *stages, end = (list(times) for times in zip(*runs, strict=True))
    whats = {"sample --num 1": [sum(times) for times in zip(*stages, strict=True)]}
    whats |= {f"  of which {name}": times for name, times in zip(STAGES, stages, strict=True)}
    whats[f"  {END}"] = end
    return [
        {"what": what, "seconds": seconds, "median": statistics.median(seconds)}
        for what, seconds in whats.items()
    ]


def one_run(out: Path) -> list[float]:
    """Seconds of each stage, and of the process's end."""
    started = time.time()
    command = [sys.executable, "-m", "benchmarks.startup", str(out), str(started)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    marks = [*json.loads(done.stdout.splitlines()[-1]), time.time()]
    return [after - before for before, after in zip([started, *marks], marks, strict=False)]


def staged(out: str) -> None:
    """The command, and then the time at the end of each of its stages."""
    from maskgit.commands.main import main

    marks = [time.time()]
    from maskgit.pipeline import Pipeline

    marks.append(time.time())
    load, sample = Pipeline.from_pretrained.__func__, Pipeline.sample  # type: ignore[attr-defined]

    def marked(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            marks.append(time.time())
            return result

        return call

    Pipeline.from_pretrained = classmethod(marked(load))  # type: ignore[assignment, method-assign]
    Pipeline.sample = marked(sample)  # type: ignore[method-assign]
    main(["sample", "--num", "1", "--class", "0", "--out", out])
    print(json.dumps([*marks, time.time()]))


if __name__ == "__main__":
    staged(sys.argv[1])
