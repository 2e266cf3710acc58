"""Mistakes that a user can make, told in one line."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake in the command, the config or the input.

    The message is one line: what is wrong, where, and the way out. Commands print it and exit
    with its status; everything else is a bug and keeps its traceback.
    """

    status = 2


class RunError(UserError):
    """What went wrong on the way and was no mistake: a full disk, a process that was killed."""

    status = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint at what `name` may have meant: "did you mean 'cosine'?", or the first known names."""
    known = [str(k) for k in known]
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`; raises UserError with the nearest known names when there is none."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: {nearest(str(name), table)}")
    return table[name]
