"""What an evaluation leaves behind: `metrics.json`, tables, and sheets to look at."""

import csv
import io
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.common import UserError
from maskgit.common.folder import FORMAT_VERSION, read_json, write_json, write_whole
from maskgit.evaluation.protocol import apart, judge, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("maskgit", "torch", "torchvision", "torch-fidelity", "numpy", "pillow")
WIDE = 1000  # columns where no terminal limits them, so that nothing is cut
UINT8 = "round(255 x)"  # how images became bytes


def environment() -> dict[str, Any]:
    """What computed: processor and versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor(), "gpu": gpu, "versions": versions}


def processor() -> str:
    """The processor's name, or its architecture where it does not tell one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def finish(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Complete `result` with its protocol and environment, and write it to out/metrics.json."""
    protocol, reasons = judge(result)
    result = {"format_version": FORMAT_VERSION, **result, **environment()}
    result |= {"protocol": protocol, "not_comparable": reasons, "uint8": UINT8}
    write_json(out / "metrics.json", result)
    return result


def save_statistics(file: Path, gaussian: Any) -> None:
    """Mean and covariance as `mu` and `sigma`, the layout that pytorch-fid reads too."""
    import numpy as np

    content = io.BytesIO()
    np.savez(content, mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy())
    write_whole(file, content.getvalue())


def load(file: Path) -> dict[str, Any]:
    """A metrics.json; UserError if it is none."""
    file = file / "metrics.json" if file.is_dir() else file
    result = read_json(file)
    parts = {"metrics", "images", "reference", "extractor", "command"}
    if not isinstance(result, dict) or not parts <= set(result):
        raise UserError(f"{file} is no metrics.json of `maskgit evaluate`")
    return result


def show(value: dict[str, Any]) -> str:
    """A value as it stands in a table: 5 digits, its deviation or standard error behind it."""
    text, spread = f"{value['value']:.5g}", value.get("deviation", value.get("standard_error"))
    return text if spread is None else f"{text} ± {spread:.2g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, in aligned plain text elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else WIDE)
    drawn = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in columns:
        drawn.add_column(column, no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn, soft_wrap=True)


def print_result(result: dict[str, Any]) -> None:
    """Its numbers, what was left out and why, and what they compare with."""
    rows = [(name, show(value), value.get("over", "")) for name, value in result["metrics"].items()]
    table(("metric", "value", "deviation over"), rows)
    for name, reason in result.get("left_out", {}).items():
        print(f"left out: {name} ({reason})")
    print(verdict(result))


def compare(files: Sequence[Path]) -> None:
    """Print results side by side, and what makes them incomparable."""
    results = [load(file) for file in files]
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    rows = [
        (name, *(show(r["metrics"][name]) if name in r["metrics"] else "-" for r in results))
        for name in names
    ]
    table(("metric", *(str(file) for file in files)), rows)
    different = apart(results)
    for line in different:
        print(f"not the same: {line}")
    print(
        "NOT COMPARABLE with each other" if different else "comparable: all that matters is equal"
    )


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of one make, at least one, as a CSV file with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue().encode())


def save_figure(file: Path, figure: "Figure") -> None:
    """A figure of matplotlib's, as its suffix says (PNG without one); the figure is closed."""
    from matplotlib import pyplot

    image = io.BytesIO()
    figure.savefig(image, format=file.suffix.lower()[1:] or "png", dpi=120)
    pyplot.close(figure)
    write_whole(file, image.getvalue())
