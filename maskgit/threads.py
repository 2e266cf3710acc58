"""Parts of a batch on threads of their own.

Threads that share each product wait for one another at the end of each, and for the slowest. Where
every thread can have images of its own, none of them waits, and their products stay in its cache.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any

import torch
from torch import Tensor


def by_threads(function: Callable[..., Tensor], parts: Iterable[tuple[Any, ...]]) -> list[Tensor]:
    """`function(*part)` of each part, without gradients, each computed by one thread; as many at a
    time as PyTorch has threads in the caller's."""
    pool = workers(torch.get_num_threads())
    return list(pool.map(lambda part: function(*part), parts))


@cache
def workers(count: int) -> ThreadPoolExecutor:
    """Threads that each compute alone. They stay, since what libraries keep for a thread is lost
    with it."""
    pool, all_there = ThreadPoolExecutor(count, initializer=alone), Barrier(count)
    list(pool.map(lambda _: all_there.wait(), range(count)))
    torch.set_num_threads(count)  # for threads to come, which else would be alone too
    return pool


def alone() -> None:
    """Let this thread compute by itself."""
    torch.get_num_threads()  # what a thread has from others it gets at its first question
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


if hasattr(os, "register_at_fork"):  # threads do not go along
    os.register_at_fork(after_in_child=workers.cache_clear)
