"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
Show = Callable[[int, str], None]  # (units done, what else to say)

SECONDS_BETWEEN_LINES = 10.0  # where stderr is no terminal


class Advance(Protocol):
    """Tells a meter that `count` more units are done, and what to show beside, such as the loss."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


def progress(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "steps"
) -> Iterator[T]:
    """Pass `items` through while showing how many are done, the rate and the time left.

    `total` is how many there are, where `items` has no length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with meter(total, what, unit) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def meter(total: int | None, what: str, unit: str = "steps", done: int = 0) -> Iterator[Advance]:
    """Show work of `total` units (None: not known), `done` of which an earlier run has done.

    The body calls the function it is given whenever some more units are done.
    """
    before, start = done, time.monotonic()
    with (_bar if sys.stderr.isatty() else _lines)(total, what, done) as show:

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            done += count
            rate = (done - before) / max(time.monotonic() - start, 1e-9)
            text = f"{rate:.3g} {unit}/s"
            if total is not None and rate > 0:
                text += f"  {clock((total - done) / rate)} left"
            show(done, f"{text}  {note}" if note else text)

        yield advance


@contextmanager
def _bar(total: int | None, what: str, done: int) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[text]}"
    console = Console(stderr=True)
    with Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=total, completed=done, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


@contextmanager
def _lines(total: int | None, what: str, done: int) -> Iterator[Show]:
    shown = time.monotonic()

    def show(done: int, text: str) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
            of = "" if total is None else f"/{total}"
            print(f"{what} {done}{of}  {text}", file=sys.stderr, flush=True)
            shown = time.monotonic()

    yield show


def clock(seconds: float) -> str:
    """Seconds as "m:ss" or "h:mm:ss"."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
