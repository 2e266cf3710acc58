"""Several processes that train one model, as `torch.distributed` knows them; or a single one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from maskgit.common.errors import RunError, UserError

T = TypeVar("T")
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")

_alone = False  # while the main process does something that the others wait for


def world() -> int:
    """How many processes there are; 1 in what the main one does while the others wait."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; the process of rank 0 is the main one."""
    return dist.get_rank() if world() > 1 else 0


def all_reduce(x: Tensor) -> Tensor:
    """Sum of `x` over all processes, in place; nothing to do in a single one."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> Tensor:
    """Rows of `x` of all processes, in the order of their ranks; without gradients."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def broadcast(x: Tensor) -> Tensor:
    """`x` as the main process has it, in place: random choices must be the same in all."""
    if world() > 1:
        dist.broadcast(x, 0)
    return x


def gather_objects(x: Any) -> list[Any]:
    """What each process gives, in the order of ranks."""
    if world() == 1:
        return [x]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, x)
    return found


def on_main(do: Callable[[], T]) -> T:
    """What `do` gives in the main process, in all of them; they wait for it.

    Where it fails they all stop: the main process with its exception, the others quietly.
    """
    global _alone
    if world() == 1:
        return do()
    outcome: list[Any] = [None, None]  # an exit status and a result
    error: BaseException | None = None
    if rank() == 0:
        _alone = True
        try:
            outcome[1] = do()
        except BaseException as caught:
            error, outcome[0] = caught, getattr(caught, "status", 1)
        finally:
            _alone = False
    dist.broadcast_object_list(outcome, 0)
    if error:
        raise error
    if outcome[0] is not None:
        raise SystemExit(outcome[0])
    return outcome[1]


def stop_all(message: str) -> None:
    """Called in all processes at once: the main one tells why, the others stop quietly."""
    if rank():
        raise SystemExit(UserError.status)
    raise UserError(message)


@contextmanager
def telling_of_others() -> Iterator[None]:
    """Where a process cannot go on because another one of a run has ended, one line says so."""
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not any(words in str(error) for words in LOST):
            raise
        raise RunError(
            "another process of this run has ended, and says why if it can: started again, the run "
            "goes on from its last checkpoint"
        ) from error
