"""How fast a run is, and how near to what its machine can do."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from maskgit.common.processes import all_reduce

T = TypeVar("T")

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # of the square matrices
SECONDS = 0.1  # for the products of one size, the first of which warms up; two there are always
APART = 100  # steps, at least, between two whose FLOPs are counted: to count takes time


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of what runs inside it, by torch's formulas of its shapes. Torch's own
    counter takes some operations apart, and then they round otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(do: Callable[[], T], compiled: bool = False) -> tuple[T, int]:
    """What `do` gives, and the FLOPs of the products, attention and convolutions that ran in it;
    those that ran again for the gradient too.

    compiled: whether something in it may be; it then runs uncompiled, or would hide what it does.
    """
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with Counter() as counter, eager:
        result = do()
    return result, counter.flops


def is_counted(step: int, log_every: int) -> bool:
    """Whether the FLOPs of this step, from 0 on, are counted: of the first one after each line of
    the log. The step's number alone decides, so that a run that goes on does what it would have
    done: a step that runs uncompiled rounds otherwise."""
    if log_every < 1:
        return False
    lines = -(-APART // log_every)
    return step % (lines * log_every) == 0


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of products (n, n) x (n, n) on this device, the best of some sizes and tries."""
    best = 0.0
    generator = torch.Generator(device).manual_seed(0)  # the global one belongs to the run
    for n in SIZES[device.type]:
        if best and 4 * n**3 / best > SECONDS:
            break
        x = torch.randn(n, n, generator=generator, device=device).to(dtype)
        times = [_timed(x), _timed(x)]
        while sum(times) < SECONDS:
            times.append(_timed(x))
        best = max(best, 2 * n**3 / min(times))
    return best


def _timed(x: Tensor) -> float:
    """Seconds that the product of a square matrix with another takes, here with its transpose."""
    wait = partial(torch.cuda.synchronize, x.device) if x.is_cuda else lambda: None
    wait()
    since = time.perf_counter()
    x @ x.t()
    wait()
    return time.perf_counter() - since


def machine_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The matrix rates of all processes together, measured at once: some may share a machine."""
    rate = all_reduce(torch.zeros((), dtype=torch.float64, device=device))  # all have come here
    return all_reduce(rate + matrix_rate(device, dtype)).item()


class Pace:
    """How fast steps are, without what happens between them; `with` surrounds one."""

    def __init__(self, machine: float = 0.0) -> None:
        """machine: its matrix rate, FLOP/s; 0 where nothing is held against it."""
        self.machine = machine
        self.flops = 0.0  # of a step, of all processes, as counted last
        self.steps, self.seconds = 0, 0.0

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.steps, self.seconds = self.steps + 1, self.seconds + time.monotonic() - self.since

    def rates(self, images: int, units: Mapping[str, int]) -> dict[str, float]:
        """Since this was last asked: of each unit how many a second, at `images` a step, and the
        share of the machine's matrix rate where there are FLOPs to tell it from."""
        steps = self.steps / self.seconds
        self.steps, self.seconds = 0, 0.0
        found = {f"{unit}_per_second": n * images * steps for unit, n in units.items()}
        if self.flops and self.machine:
            found["share_of_matrix_rate"] = self.flops * steps / self.machine
        return found
