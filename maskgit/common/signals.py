"""SIGTERM and Ctrl-C that must not end what is going on just anywhere."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal has ended a wait. No Exception, so that no code on the way takes it for an error."""


class Held(list[int]):
    """The number of the signal that was received, if one was."""

    waiting = False  # for what a signal may end

    def note(self, number: int, frame: object) -> None:
        self.append(number)
        if self.waiting:
            raise Interrupted

    @contextmanager
    def ending(self) -> Iterator[None]:
        """A block that a signal ends, with Interrupted: a wait for what may never come."""
        self.waiting = True
        try:
            if self:
                raise Interrupted
            yield
        finally:
            self.waiting = False


_held: list[Held] = []  # the outermost block's, while in one


@contextmanager
def held() -> Iterator[Held]:
    """Of SIGTERM and SIGINT the first is only noted, in what this gives; a second one ends the
    process at once. A block within another notes what the outer one does."""
    if _held:
        yield _held[0]
        return
    received = Held()
    with _watched(received.note, 1):
        _held.append(received)
        try:
            yield received
        finally:
            _held.clear()


@contextmanager
def deadly() -> Iterator[None]:
    """SIGTERM and SIGINT end the process at once: there is nothing to lose, and an exception could
    be taken for an error, or never come."""
    with _watched(lambda number, frame: None, 0):
        yield


@contextmanager
def _watched(handler: Callable[[int, object], None], most: int) -> Iterator[None]:
    """A block with this handler of SIGTERM and SIGINT. After `most` of them the next one ends the
    process, with the status 128 + its number.

    A thread sees to that: the main one may be waiting for another process, or for a disk, and
    handles no signal then. Within another thread, the block is as any other.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as Python wants it

    def watch() -> None:
        count = 0
        while number := os.read(reading, 1):  # of each signal that this process handles
            count += number[0] in NUMBERS
            if count > most:
                os._exit(128 + number[0])
        os.close(reading)

    # A signal that reached that thread instead of the main one would not wake the main one.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    threading.Thread(target=watch, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    before = {number: signal.signal(number, handler) for number in NUMBERS}
    waker = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(waker)
        for number, old in before.items():
            signal.signal(number, old)
        os.close(writing)
