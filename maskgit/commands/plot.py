"""`maskgit plot`: the curves of training runs, several in one picture."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit.commands.shared import check_writable
from maskgit.common import UserError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELP = "draw the curves of training runs"
EXAMPLE = "maskgit plot runs/emoji_vqgan_smoke --out out/curves.png"

SUFFIXES = (".png", ".svg", ".pdf")
# What is drawn unless --metrics says otherwise, of what the runs have, in this order.
SENSIBLE = (
    *("loss", "reconstruction", "psnr", "accuracy", "top1", "image_to_text@10", "zero_shot_top1"),
    *("usage", "discriminator_accuracy", "adversarial_weight"),
)
UNITS = {"psnr": "dB"}
SHARE = re.compile(r"usage|accuracy|share|top\d|@\d")  # names of what lies between 0 and 1 ...
WHOLE = ("usage", "discriminator_accuracy")  # ... and is read against 1
COLOURS = ("#2f6fb0", "#d1622b", "#3a8f5c", "#8a5fb5", "#b8902a", "#c2497f", "#3f9e9e", "#6b6b6b")
INK, GRID = "#333333", "#e4e4e4"
LINES = {"": "-", "heldout": "-", "train": "--"}  # by set; dotted for any other
SMOOTHED = 30  # values of a curve, from which on its running mean is drawn over it
MARKED = 40  # values of a curve, up to which each has a mark

Curve = tuple[list[int], list[float]]  # steps, values
Curves = dict[str, Curve]  # of one run, by name: "loss", "heldout/psnr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .svg or .pdf")
    parser.add_argument(
        "--metrics",
        help="what to draw, such as loss,heldout/psnr (by default what tells most); a name without "
        "a set stands for that of all sets",
    )


def run(args: argparse.Namespace) -> int:
    if args.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {args.out}: its name must end in {', '.join(SUFFIXES)}")
    check_writable(args.out)
    runs = {name: read(folder) for name, folder in titles(args.runs).items()}
    panels = choose(runs, args.metrics.split(",") if args.metrics else None)

    from maskgit.evaluation.report import save_figure

    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_figure(args.out, draw(runs, panels))
    print(args.out)
    return 0


def titles(folders: Sequence[Path]) -> dict[str, Path]:
    """Runs by name: a folder's own, or its path where two have the same name."""
    folders = list(dict.fromkeys(folders))
    own = [folder.resolve().name for folder in folders]
    return {
        name if own.count(name) == 1 else str(folder): folder
        for name, folder in zip(own, folders, strict=True)
    }


def read(folder: Path) -> Curves:
    """All that a run has noted so far; UserError if that is nothing."""
    from maskgit.engine.journal import entries

    file = folder if folder.name == "metrics.jsonl" else folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"no {file}: {folder} is no run of `maskgit train`, or has logged nothing")
    curves: Curves = {}
    for _, values in entries(file):
        for name, value in values.items():
            if name != "step" and abs(value) < float("inf"):
                steps, found = curves.setdefault(name, ([], []))
                steps.append(values["step"])
                found.append(value)
    if not curves:
        raise UserError(f"{file} holds no values as yet: try again after train.log_every steps")
    return curves


def choose(runs: Mapping[str, Curves], wanted: Sequence[str] | None) -> dict[str, list[str]]:
    """Panels by title, and the curves that each has: {"loss": ["loss", "heldout/loss"]}."""
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(quantity(name), []).append(name)
    if wanted is None:
        panels = {name: found[name] for name in SENSIBLE if name in found}
        return panels or found
    panels = {}
    for name in wanted:
        if name not in found and name not in names:
            hint = nearest(name, [*found, *(n for n in names if "/" in n)])
            raise UserError(f"--metrics {name}: none of the runs has it; {hint}")
        panels[name] = found.get(name, [name])
    return panels


def quantity(name: str) -> str:
    """What a value is of, whatever the set: "loss" of "heldout/loss"."""
    return name.rpartition("/")[2]


def draw(runs: Mapping[str, Curves], panels: Mapping[str, Sequence[str]]) -> "Figure":
    """One panel a quantity and one colour a run: training faint, held-out bold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = (4.2 * columns, 2.9 * rows + 0.6)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharex=True)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes = list(grid.flat)
    for unused in axes[len(panels) :]:
        unused.remove()
    sets: set[str] = set()
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for i, curves in enumerate(runs.values()):
            own = [name for name in names if name in curves]
            faint = any("/" in name for name in own)  # there is one that tells more
            for name in own:
                draw_curve(axis, name.rpartition("/")[0], curves[name], pick_colour(i), faint)
                sets.add(name.rpartition("/")[0])
        dress(axis, title)
    figure.supxlabel("step", fontsize=8, color=INK)
    add_legend(figure, list(runs), sorted(sets))
    return figure


def dress(axis: "Axes", title: str) -> None:
    """A panel around what is drawn in it."""
    name = quantity(title)
    axis.set_title(f"{title} ({UNITS[name]})" if name in UNITS else title, loc="left", fontsize=10)
    axis.title.set_color(INK)
    axis.grid(color=GRID, linewidth=0.8)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#bbbbbb")
    axis.tick_params(length=0, labelsize=8, labelcolor=INK, labelbottom=True)
    axis.locator_params(nbins=5)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlim(left=0)
    if SHARE.search(name):
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    if name in WHOLE:
        axis.set_ylim(top=1.02)


def draw_curve(axis: "Axes", of: str, curve: Curve, colour: str, faint: bool) -> None:
    """One curve of the set `of`; of what training logs ("") the running mean over the values."""
    steps, values = curve
    if of:
        marker = "o" if len(steps) <= MARKED else ""
        style = LINES.get(of, ":")
        axis.plot(steps, values, style, color=colour, linewidth=2, marker=marker, markersize=3.5)
        return
    if len(steps) >= SMOOTHED:
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        values = running_mean(values)
    axis.plot(steps, values, color=colour, linewidth=1.5, alpha=0.5 if faint else 1.0)


def running_mean(values: Sequence[float]) -> list[float]:
    """Of each value the mean with its neighbours, a 30th of the curve on each side."""
    reach = max(1, len(values) // SMOOTHED)
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in near]


def add_legend(figure: "Figure", runs: Sequence[str], sets: Sequence[str]) -> None:
    """Over the panels: which colour is which run, which line which set."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=pick_colour(i), linewidth=4) for i in range(len(runs))]
    labels = list(runs)
    for of in sets if len(sets) > 1 else ():
        line = Line2D([], [], color=INK, linewidth=2, marker="o", markersize=3.5)
        if not of:
            line.set(linewidth=1.5, marker="", alpha=0.5)
        line.set(linestyle=LINES.get(of, ":"))
        lines.append(line)
        labels.append(of or "while training")
    wide = [0.6 + 0.08 * len(label) for label in labels]  # inches, about
    columns = len(labels) if sum(wide) < figure.get_figwidth() else 1
    columns = max(columns, int(figure.get_figwidth() / max(wide)))
    style = {"frameon": False, "fontsize": 9, "handlelength": 3}
    figure.legend(lines, labels, loc="outside upper left", ncols=columns, **style)


def pick_colour(i: int) -> str:
    """Of the i-th run."""
    return COLOURS[i % len(COLOURS)]
