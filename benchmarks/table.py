"""The table of a benchmark: a line a row, as soon as it is measured."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]
WIDE, NARROW = 60, 10


def number(key: str, unit: float = 1, form: str = ".4g") -> Callable[[Row], str]:
    """A column: what a row has under a key, in units of `unit`; a dash where it has nothing."""
    return lambda row: format(row[key] / unit, form) if row.get(key) is not None else "-"


def spread(row: Row) -> str:
    """Between the quickest and the slowest repeat."""
    return f"{max(row['seconds']) - min(row['seconds']):.2g}" if "seconds" in row else "-"


TIMES: Columns = {"s": number("median"), "spread": spread}
LIMITS: Columns = {
    "GFLOP": number("flops", 1e9),
    **TIMES,
    "GFLOP/s": number("rate", 1e9, ".0f"),
    "limit": number("limit", 1e9, ".0f"),
    "ratio": number("ratio", form=".2f"),
    "MB": number("memory", form=".0f"),
    "times": number("times", form=".3f"),
}


def heading(columns: Columns) -> str:
    return line(("what", *columns))


def shown(row: Row, columns: Columns) -> str:
    return line((row["what"], *(cell(row) for cell in columns.values())))


def line(cells: tuple[str, ...]) -> str:
    what, *others = cells
    return what.ljust(WIDE) + "".join(cell.rjust(NARROW) for cell in others)
