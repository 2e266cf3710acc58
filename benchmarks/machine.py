"""What this machine can do at most, and what a function takes of it.

FLOPs are counted from the shapes of the products and convolutions that really run, by torch's own
counter, as `maskgit train --dry-run` does. Each repeat of a function is timed right after the limit
it is held against: products or convolutions alone, of the shapes that occurred in it. Other
programs on the machine then slow both. Processor time, of all threads, they slow less.
"""

import re
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Function = Callable[[], Any]
aten = torch.ops.aten
QUICK = 3  # times that each shape of a limit is tried at each repeat; the best counts


class Clock(NamedTuple):
    """Seconds: on the wall, and of the processor (of all threads together)."""

    wall: float
    processor: float


def wait() -> None:
    """Until a GPU has done what it was told."""
    if torch.cuda.is_available():
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


def rate_of(flops: float, clock: Clock) -> Rate:
    return Rate(flops / clock.wall, flops / max(clock.processor, 1e-9))


def quickest(function: Function) -> Clock:
    clocks = [timed(function) for _ in range(QUICK)]
    return Clock(min(c.wall for c in clocks), min(c.processor for c in clocks))


def best_product(shapes: Shapes) -> Callable[[], Rate]:
    """The best rate of all the products: none of them runs faster."""
    functions = [product(*key) for key in shapes.products]
    flops = [count_flops(function) for function in functions]

    def limit() -> Rate:
        rates = [rate_of(n, quickest(f)) for n, f in zip(flops, functions, strict=True)]
        return Rate(max(r.wall for r in rates), max(r.processor for r in rates))

    return limit


def all_convolutions(shapes: Shapes) -> Callable[[], Rate]:
    """The rate of all the convolutions one after the other, each as often as it occurs."""

    def limit() -> Rate:
        flops, wall, processor = 0, 0.0, 0.0
        for key, times in shapes.convolutions.items():
            function = convolution(*key)
            flops += times * count_flops(function)
            clock = quickest(function)
            wall, processor = wall + times * clock.wall, processor + times * clock.processor
        return rate_of(flops, Clock(wall, processor))

    return limit


def peak_memory() -> float:
    """Megabytes that this process, or the GPU, held at most since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    return int(found[1]) / 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> None:
    """Forget the peak so far, where the system lets one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure(
    what: str,
    function: Function,
    repeats: int,
    limit: Callable[[Shapes], Callable[[], Rate]] | None = best_product,
    before: Function = lambda: None,
) -> dict[str, Any]:
    """One row: work, the times of all repeats, rate, limit, their ratio, and peak memory.

    `function` runs once more at first, when its work, its shapes and its memory are noted. A ratio
    is the median of those of the repeats, each with the limit just before it. Without `limit`
    there are neither rates nor ratios. `before` is called before each run, in nobody's time.
    """
    shapes = Shapes()
    before()
    reset_peak()
    with shapes:
        work = count_flops(function)
    row: dict[str, Any] = {"what": what, "flops": work, "memory": peak_memory()}
    most = limit(shapes) if limit else None
    clocks, rates = [], []
    for _ in range(repeats):
        rates += [most()] if most else []
        before()
        clocks.append(timed(function))
    row["seconds"] = [clock.wall for clock in clocks]
    row["processor_seconds"] = [clock.processor for clock in clocks]
    row["median"] = statistics.median(row["seconds"])
    if rates:
        own = [rate_of(work, clock) for clock in clocks]
        pairs = list(zip(own, rates, strict=True))
        row["rate"] = work / row["median"]
        row["limit"] = statistics.median(rate.wall for rate in rates)
        row["ratio"] = statistics.median(a.wall / b.wall for a, b in pairs)
        row["ratio_processor"] = statistics.median(a.processor / b.processor for a, b in pairs)
    return row
