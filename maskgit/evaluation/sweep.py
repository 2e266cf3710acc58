"""Scores of one model over its sampler's settings: a grid of cells, each kept when it is done."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskgit.common.folder import read_json, write_json
from maskgit.evaluation import generate
from maskgit.evaluation.report import save_figure
from maskgit.evaluation.score import Scorer, score
from maskgit.evaluation.sets import open_pixels
from maskgit.pipeline import Pipeline


@dataclass(frozen=True)
class Cell:
    """One combination of settings."""

    steps: int
    schedule: str
    guidance: float

    @property
    def name(self) -> str:
        return f"steps-{self.steps}_{self.schedule}_guidance-{self.guidance:g}"

    def file(self, out: Path) -> Path:
        """Where its row is kept."""
        return out / "cells" / f"{self.name}.json"


def run_cell(
    cell: Cell,
    pipe: Pipeline,
    scorer: Scorer,
    metrics: Sequence[str],
    labels: Sequence[int | None],
    seed: int,
    out: Path,
    settings: dict[str, Any],
    batch_size: int,
) -> dict[str, Any]:
    """The cell's row, from the file where an earlier run left it, or by drawing and scoring.

    The images are drawn with the same seeds in each cell, and deleted once they are scored. The
    rate is of the images that this call drew.
    """
    file = cell.file(out)
    folder = out / "images" / cell.name
    if file.exists():
        shutil.rmtree(folder, ignore_errors=True)  # where a kill came before it was deleted
        return read_json(file)
    start = time.monotonic()
    drawn = generate.draw(pipe, labels, seed, folder, settings | asdict(cell), batch_size)
    seconds = time.monotonic() - start
    generate.check_complete(folder, len(labels))
    found = score(metrics, scorer, open_pixels(str(folder)), labels)
    row = asdict(cell) | {name: value["value"] for name, value in found.items()}
    row["images/s"] = drawn / seconds if drawn else None
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, row)
    shutil.rmtree(folder)
    shutil.rmtree(scorer.cache, ignore_errors=True)
    return row


def plot(file: Path, rows: Sequence[dict[str, Any]], quality: str, diversity: str | None) -> None:
    """Quality against steps, a line for each schedule and guidance; and quality against diversity
    along guidance, a line for each schedule at the number of steps that is best for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 if diversity else 1, figsize=(10, 4), squeeze=False)
    lines: dict[tuple[str, float], list[dict]] = {}
    for row in rows:
        lines.setdefault((row["schedule"], row["guidance"]), []).append(row)
    for (schedule, guidance), line in lines.items():
        x, y = [row["steps"] for row in line], [row[quality] for row in line]
        axes[0][0].plot(x, y, marker="o", label=f"{schedule}, guidance {guidance:g}")
    axes[0][0].set(xscale="log", xlabel="steps", ylabel=quality)
    axes[0][0].set_xticks(sorted({row["steps"] for row in rows}), minor=False)
    axes[0][0].get_xaxis().set_major_formatter("{x:.0f}")
    axes[0][0].legend(fontsize=7)
    if diversity:
        for schedule in dict.fromkeys(row["schedule"] for row in rows):
            own = [row for row in rows if row["schedule"] == schedule]
            steps = min(own, key=lambda row: row[quality])["steps"]
            line = [row for row in own if row["steps"] == steps]
            x, y = [row[diversity] for row in line], [row[quality] for row in line]
            axes[0][1].plot(x, y, marker="o", label=f"{schedule}, {steps} steps")
            for row in line:
                point = (row[diversity], row[quality])
                axes[0][1].annotate(f"{row['guidance']:g}", point, fontsize=7)
        axes[0][1].set(xlabel=f"{diversity} (numbers: guidance)", ylabel=quality)
        axes[0][1].legend(fontsize=7)
    figure.tight_layout()
    save_figure(file, figure)
