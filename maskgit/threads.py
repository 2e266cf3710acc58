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


def threads_apart() -> int:
    """How many threads may compute apart: PyTorch's; 1 where new ones would have other settings
    than this one, or fewer processors than there are threads."""
    count = torch.get_num_threads()
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return 1 if torch.is_autocast_enabled("cpu") or free < count else count


def by_threads(function: Callable[..., Tensor], parts: Iterable[tuple[Any, ...]]) -> list[Tensor]:
    """`function(*part)` of each part, in their order and without gradients, each computed by one
    thread; as many at a time as PyTorch has threads in the caller's."""
    pool = workers(torch.get_num_threads())
    return list(pool.map(lambda part: function(*part), parts))


@cache
def workers(count: int) -> ThreadPoolExecutor:
    """Threads that each compute alone. They stay: MKL and oneDNN keep buffers for each."""
    pool, all_there = ThreadPoolExecutor(count, initializer=alone), Barrier(count)
    try:
        list(pool.map(lambda _: all_there.wait(), range(count)))
    finally:
        torch.set_num_threads(count)  # else threads to come would be alone too
    return pool


def alone() -> None:
    """Let this thread compute by itself, without gradients."""
    torch.get_num_threads()  # at the first call a thread takes the number of the process
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


if hasattr(os, "register_at_fork"):  # threads do not go along
    os.register_at_fork(after_in_child=workers.cache_clear)
