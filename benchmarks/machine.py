"""What this machine can do at most, and what a function takes of it.

FLOPs are counted from the shapes of the products and convolutions that really run, as
`maskgit train --dry-run` does. The limit of a function, products or convolutions alone, of the
shapes that occurred in it, is measured right before and right after each of its repeats, so that
what else slows the machine (on rented ones, there is always something) slows both alike; and
medians are held against medians: the luckiest try says more of luck than of the machine.
"""

import re
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.table import Row
from maskgit.engine.speed import flops_of
from maskgit.products import by_columns
from maskgit.threads import by_threads

Function = Callable[[], Any]
aten = torch.ops.aten
TRIES = 5  # of each shape of a limit, before and after each repeat; the median counts


def cuda() -> bool:
    """Whether a GPU is what is measured."""
    return torch.cuda.is_available()


def wait() -> None:
    """Until a GPU has done what it was told."""
    if cuda():
        torch.cuda.synchronize()


def timed(function: Function, calls: int = 1) -> float:
    """Seconds that calling `function` takes, the mean of some calls one right after the other."""
    wait()
    since = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter() - since) / calls


class Shapes(TorchDispatchMode):
    """Counts the products (m, k) x (k, n) and the convolutions that run inside it, by shape.

    What threads of their own would compute runs in this one, where it can be seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.threads = 1  # that compute such products at a time, each its own
        self.products: Counter[tuple[Any, ...]] = Counter()  # by threads and what `product` takes
        self.convolutions: Counter[tuple[Any, ...]] = Counter()  # and of `convolution`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in (aten.mm, aten.addmm):
            a, b = args[-2:]
            self.products[self.threads, *a.shape, b.shape[1], a.dtype, a.device] += 1
        elif packet == aten.convolution:
            x, weight, _, stride, padding = args[:5]
            sizes = x.shape, weight.shape, tuple(stride), tuple(padding)
            self.convolutions[*sizes, x.dtype, x.device] += 1
        return func(*args, **(kwargs or {}))

    def in_turn(self, function: Callable[..., Any], parts: Iterable[tuple[Any, ...]]) -> list[Any]:
        """In place of `by_threads`."""
        self.threads = torch.get_num_threads()
        try:
            return [function(*part) for part in parts]
        finally:
            self.threads = 1


def product(m: int, k: int, n: int, dtype: torch.dtype, device: Any) -> Function:
    """A linear layer's product (m, k) x (k, n), its result written where it was before."""
    x, weight = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k)))
    weight, out = by_columns(weight), torch.empty(m, n, dtype=dtype, device=device)
    return lambda: torch.mm(x, weight.t(), out=out)


def convolution(
    x: Any, weight: Any, stride: Any, padding: Any, dtype: torch.dtype, device: Any
) -> Function:
    """A convolution of tensors of these shapes, channels-last."""
    x, weight = (
        torch.randn(size, device=device).to(dtype).to(memory_format=torch.channels_last)
        for size in (x, weight)
    )
    return lambda: F.conv2d(x, weight, None, stride, padding)


Limit = Callable[[], list[float]]  # measures what may be the limit, FLOP/s


def usual(function: Function) -> float:
    """The median of some tries, seconds. On a GPU each is of many calls, or launching them and
    waiting for them would count."""
    return statistics.median(timed(function, 20 if cuda() else 1) for _ in range(TRIES))


def products_apart(shapes: Shapes) -> Limit:
    """The rate of each of the products, computed by all threads together. Of those that threads had
    apart, also that of as many more rows as there are threads, and that of each thread with its
    own. The limit is that of the best."""

    def limit() -> list[float]:
        rates = []
        for threads, m, *others in sorted(shapes.products, key=str):
            for rows in sorted({m, threads * m}):
                function = product(rows, *others)
                rates.append(flops_of(function)[1] / usual(function))
            if threads > 1:
                rates.append(rate_apart(threads, m, *others))
        return rates

    return limit


def rate_apart(threads: int, *shape: Any) -> float:
    """FLOP/s of threads that each compute products of their own of this shape, one by one."""
    own = [product(*shape) for _ in range(threads)]
    times = 8  # that threads wait for each other once in

    def some(function: Function) -> Any:
        return [function() for _ in range(times)][-1]

    work = threads * times * flops_of(own[0])[1]
    return work / usual(lambda: by_threads(some, zip(own, strict=True)))


def all_convolutions(shapes: Shapes) -> Limit:
    """The rate of all the convolutions one after the other, each as often as it occurs."""

    def limit() -> list[float]:
        flops, seconds = 0, 0.0
        for key, times in shapes.convolutions.items():
            function = convolution(*key)
            flops += times * flops_of(function)[1]
            seconds += times * usual(function)
        return [flops / seconds]

    return limit


def peak_memory() -> float:
    """Megabytes that this process, or the GPU, held at most since `reset_peak`."""
    if cuda():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return int(found[1]) / 2**10
    unit = 2**10 if sys.platform == "linux" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak() -> None:
    """Forget the peak so far, where the system lets one."""
    if cuda():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure(
    what: str,
    function: Function,
    repeats: int = 4,
    limit: Callable[[Shapes], Limit] | None = products_apart,
    against: Function | None = None,
    compiled: bool = False,
) -> Row:
    """One row: work, the times of all repeats, rate, limit, their ratio, and peak memory.

    `function` runs once more at first, when its work and its shapes are noted. The limit is the
    rate with the highest median of those that `limit` measures; the ratio, the median of those of
    the repeats, each to the limit's mean before and after it. Without `limit` there are neither
    rates nor ratios. `times` is how many times as long as `against` it takes: the median of the
    repeats, each to the mean of `against` before and after it. Memory is that of the first repeat.
    compiled: whether something in `function` may be; its work is that of the same uncompiled.
    """
    shapes = Shapes()
    with shapes, patch("maskgit.fast.by_threads", shapes.in_turn):
        _, work = flops_of(function, compiled)
    row: Row = {"what": what, "flops": work}
    most = limit(shapes) if limit else list
    others, seconds, rates = [timed(against)] if against else [], [], [most()]
    for _ in range(repeats):
        reset_peak()
        seconds.append(timed(function))
        row.setdefault("memory", peak_memory())
        rates.append(most())
        others += [timed(against)] if against else []
    row |= {"seconds": seconds, "median": statistics.median(seconds)}
    if limit:
        best = max(zip(*rates, strict=True), key=statistics.median)
        row |= {"rate": work / row["median"], "limit": statistics.median(best)}
        row["ratio"] = beside([work / s for s in seconds], best)
    if against:
        row["times"] = beside(seconds, others)
    return row


def beside(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the values, each by the mean of the two others that it lies between."""
    around = [(before + after) / 2 for before, after in pairwise(others)]
    return statistics.median(v / other for v, other in zip(values, around, strict=True))
