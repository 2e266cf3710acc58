"""`python -m benchmarks compare old.json new.json`: what became slower, and what faster."""

from pathlib import Path
from typing import Any

from maskgit.common import UserError
from maskgit.common.folder import read_json
from maskgit.evaluation.report import table

FEWEST = 4  # repeats of each: of noise alone, one comparison in 70 is then called slower


def verdict(old: list[float], new: list[float]) -> str:
    """What the times of two runs' repeats say: "slower" or "faster" only where all of the one lie
    above all of the other, so that the difference is more than the noise of both."""
    if min(len(old), len(new)) < FEWEST:
        return "too few repeats"
    if min(new) > max(old):
        return "slower"
    return "faster" if max(new) < min(old) else "within the noise"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, float | None, str]]:
    """For each timed row of either: what, the new median time by the old one, the verdict."""
    before, after = (
        {row["what"]: row for row in result["rows"] if "seconds" in row} for result in (old, new)
    )
    rows: list[tuple[str, float | None, str]] = []
    for what in {**before, **after}:
        if what not in after:
            rows.append((what, None, "only in the old one"))
        elif what not in before:
            rows.append((what, None, "only in the new one"))
        else:
            one, other = before[what], after[what]
            ratio = other["median"] / one["median"]
            rows.append((what, ratio, verdict(one["seconds"], other["seconds"])))
    return rows


def load(file: str | Path) -> dict[str, Any]:
    """A benchmark's JSON; UserError if it is none."""
    result = read_json(Path(file))
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise UserError(f"{file} is no result of `python -m benchmarks`")
    return result


def run(old: str | Path, new: str | Path) -> bool:
    """Print the comparison; whether nothing became slower."""
    results = load(old), load(new)
    rows = compare(*results)
    shown = [(what, "-" if r is None else f"{r:.2f}", said) for what, r, said in rows]
    table(("what", "new / old", "verdict"), shown)
    for name in "processor", "gpu", "threads", "dtype":
        values = [result.get(name) for result in results]
        if values[0] != values[1]:
            print(f"not the same {name}: {values[0]} and {values[1]}")
    slower = [what for what, _, said in rows if said == "slower"]
    print(f"slower: {', '.join(slower)}" if slower else "nothing is slower by more than the noise")
    return not slower
