"""What this machine can do at most, and what a function takes of it.

FLOPs are counted from the shapes of the products and convolutions that really run, by torch's own
counter, as `maskgit train --dry-run` does. The limit of a function, products or convolutions alone,
of the shapes that occurred in it, is measured right before and right after each of its repeats, so
that what else slows the machine (on rented ones, there is always something) slows both alike; and
medians are held against medians: the luckiest try of a limit says more of luck than of the machine.
Processor time, of all threads, other programs slow less.
"""

import re
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.table import Row

Function = Callable[[], Any]
aten = torch.ops.aten
TRIES = 5  # of each shape of a limit, before and after each repeat; the median counts


class Clock(NamedTuple):
    """Seconds: on the wall, and of the processor (of all threads together)."""

    wall: float
    processor: float


def cuda() -> bool:
    """Whether a GPU is what is measured."""
    return torch.cuda.is_available()


def wait() -> None:
    """Until a GPU has done what it was told."""
    if cuda():
        torch.cuda.synchronize()


def timed(function: Function) -> Clock:
    """What calling `function` once takes."""
    wait()
    wall, processor = time.perf_counter(), time.process_time()
    function()
    wait()
    return Clock(time.perf_counter() - wall, time.process_time() - processor)


def count_flops(function: Function) -> int:
    """FLOPs of products, attention and convolutions in one call, from their shapes."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Shapes(TorchDispatchMode):
    """Counts the products (m, k) x (k, n) and the convolutions that run inside it, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[Any, ...]] = Counter()  # by the arguments of `product`
        self.convolutions: Counter[tuple[Any, ...]] = Counter()  # and of `convolution`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in (aten.mm, aten.addmm):
            a, b = args[-2:]
            self.products[*a.shape, b.shape[1], a.dtype, a.device] += 1
        elif packet == aten.convolution:
            x, weight, _, stride, padding = args[:5]
            sizes = x.shape, weight.shape, tuple(stride), tuple(padding)
            self.convolutions[*sizes, x.dtype, x.device] += 1
        return func(*args, **(kwargs or {}))


def product(m: int, k: int, n: int, dtype: torch.dtype, device: Any) -> Function:
    """A linear layer's product (m, k) x (k, n), its result written where it was before."""
    x, weight = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k)))
    out = torch.empty(m, n, dtype=dtype, device=device)
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


class Rate(NamedTuple):
    """FLOP/s: by the wall's clock, and a second of processor time."""

    wall: float
    processor: float


Limit = Callable[[], list[Rate]]  # measures what may be the limit


def rate_of(flops: float, clock: Clock) -> Rate:
    return Rate(flops / clock.wall, flops / max(clock.processor, 1e-9))


def usual(function: Function) -> Clock:
    """The median of some tries."""
    clocks = [timed(function) for _ in range(TRIES)]
    return Clock(*map(statistics.median, zip(*clocks, strict=True)))


def products_apart(shapes: Shapes) -> Limit:
    """The rate of each of the products. The limit is that of the best: none of them runs faster."""
    functions = [product(*key) for key in shapes.products]
    flops = [count_flops(function) for function in functions]
    return lambda: [rate_of(n, usual(f)) for n, f in zip(flops, functions, strict=True)]


def all_convolutions(shapes: Shapes) -> Limit:
    """The rate of all the convolutions one after the other, each as often as it occurs."""

    def limit() -> list[Rate]:
        flops, wall, processor = 0, 0.0, 0.0
        for key, times in shapes.convolutions.items():
            function = convolution(*key)
            flops += times * count_flops(function)
            clock = usual(function)
            wall, processor = wall + times * clock.wall, processor + times * clock.processor
        return [rate_of(flops, Clock(wall, processor))]

    return limit


def peak_memory() -> float:
    """Megabytes that this process, or the GPU, held at most since `reset_peak`."""
    if cuda():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    return int(found[1]) / 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> None:
    """Forget the peak so far, where the system lets one."""
    if cuda():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure(
    what: str,
    function: Function,
    repeats: int,
    limit: Callable[[Shapes], Limit] | None = products_apart,
) -> Row:
    """One row: work, the times of all repeats, rate, limit, their ratio, and peak memory.

    `function` runs once more at first, when its work, its shapes and its memory are noted. The
    limit is the rate with the highest median of those that `limit` measures; a ratio, the median of
    those of the repeats, each to the limit's mean before and after it. Without `limit` there are
    neither rates nor ratios.
    """
    shapes = Shapes()
    reset_peak()
    with shapes:
        work = count_flops(function)
    row: Row = {"what": what, "flops": work, "memory": peak_memory()}
    most = limit(shapes) if limit else list
    clocks, rates = [], [most()]
    for _ in range(repeats):
        clocks.append(timed(function))
        rates.append(most())
    row["seconds"] = [clock.wall for clock in clocks]
    row["processor_seconds"] = [clock.processor for clock in clocks]
    row["median"] = statistics.median(row["seconds"])
    if limit:
        row["rate"] = work / row["median"]
        row |= compared([rate_of(work, clock) for clock in clocks], rates)
    return row


def compared(own: list[Rate], rates: list[list[Rate]]) -> Row:
    """The limit, and the ratio to it by each clock: own rates, and the others around each."""
    best = max(zip(*rates, strict=True), key=lambda tried: statistics.median(r.wall for r in tried))
    row: Row = {"limit": statistics.median(rate.wall for rate in best)}
    for name, clock in ("ratio", "wall"), ("ratio_processor", "processor"):
        tried, reached = ([getattr(rate, clock) for rate in some] for some in (best, own))
        around = [(before + after) / 2 for before, after in pairwise(tried)]
        row[name] = statistics.median(r / limit for r, limit in zip(reached, around, strict=True))
    return row


def in_turns(what: str, function: Function, other: Function, repeats: int) -> Row:
    """One row for `function`, and how many times as long as `other` it takes, by the processor's
    time where there is no GPU: the median over turns, each of both."""
    clocks, times = [], []
    for turn in range(repeats + 1):
        one, two = timed(function), timed(other)
        if turn:  # the first one warms up
            clocks.append(one.wall)
            times.append(one.wall / two.wall if cuda() else one.processor / two.processor)
    median = statistics.median(clocks)
    return {"what": what, "seconds": clocks, "median": median, "times": statistics.median(times)}
