"""Lists of samples made into batches, in this process or in workers."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskgit.common import RunError, UserError
from maskgit.engine.order import sample_seeds

Pairs = list[tuple[int, int | None]]  # the image and the number of each sample of a batch


class Source(Protocol):
    """A set of images: see `data.ImageSet`."""

    def get(self, index: int, draw: int | None, seed: int) -> dict[str, Any]: ...

    def report(self, broken: dict[str, str]) -> None: ...


class _Batches(Dataset):
    """Turns a list of (index, draw) into a batch, wherever the loader runs it."""

    def __init__(self, images: Source, seed: int):
        self.images, self.seed = images, seed

    def __getitem__(self, pairs: Pairs) -> dict[str, Any] | UserError:
        try:
            samples = [self.images.get(index, draw, self.seed) for index, draw in pairs]
        except UserError as error:  # raised in a worker, it would lose its one line
            return error
        broken = {path: why for sample in samples for path, why in sample["broken"].items()}
        kept = [
            sample
            for sample, (index, draw) in zip(samples, pairs, strict=True)
            if draw is not None or sample["index"] == index
        ]
        if not kept:
            return {"broken": broken}
        batch = {
            "image": torch.stack([sample["image"] for sample in kept]),  # (B, 3, H, W)
            "label": torch.tensor([sample["label"] for sample in kept]),
            "index": torch.tensor([sample["index"] for sample in kept]),
        }
        draws = [draw for _, draw in pairs if draw is not None]
        if draws:
            batch["seed"] = sample_seeds(self.seed, draws)  # (B,)
        return batch | {"broken": broken}


def load(
    images: Source, plan: Iterable[Pairs], seed: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """The batches of a plan, in its order: see `data.batches` and `data.in_order`.

    Unusable files are reported to `images`. Raises RunError when a worker dies, which takes a few
    seconds to be noticed.
    """
    loader = DataLoader(
        _Batches(images, seed),
        batch_size=None,
        sampler=plan,
        num_workers=workers,
        worker_init_fn=_leave_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the global one, and resume is not exact
    )
    others = set(multiprocessing.active_children())
    stream = _begin(loader)
    started = set(multiprocessing.active_children()) - others
    while True:
        try:
            batch = next(stream)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not workers or not _died(error):
                raise
            raise RunError(
                f"a data worker died ({_how(started)}): out of memory? Started again, the run goes "
                f"on from its last checkpoint; fewer workers need less (data.workers={workers})"
            ) from error
        if isinstance(batch, UserError):
            raise batch
        images.report(batch.pop("broken"))
        if batch:
            yield batch


def _died(error: Exception) -> bool:
    """Whether this is how torch tells that a worker is gone, or that what it had made before cannot
    be had from it any more; and not a mistake in what it ran."""
    lost = isinstance(error, (OSError, EOFError)) or "DataLoader worker (pid" in str(error)
    return lost and "in DataLoader worker process" not in str(error)


def _how(processes: Iterable[multiprocessing.process.BaseProcess]) -> str:
    """How those processes ended that did: "SIGKILL", "exit status 3"."""
    ending = wait([process.sentinel for process in processes], timeout=5)
    for process in processes:
        if process.sentinel in ending:
            process.join(timeout=5)  # its files are closed a moment before it has a status
    codes = sorted({process.exitcode or 0 for process in processes} - {0})
    ends = [signal.Signals(-c).name if c < 0 else f"exit status {c}" for c in codes]
    return ", ".join(ends) or "exited"


def _begin(loader: DataLoader) -> Iterator[Any]:
    """Start the workers; no signal reaches them before they are ready for it."""
    handler = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        if handler is not None and signal.getsignal(signal.SIGCHLD) is not handler:
            # Torch's would raise wherever a worker's death finds this process, in the middle of a
            # step; asking for the next batch tells as well.
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # what was held up may raise now


def _leave_signals(worker: int) -> None:
    """Ctrl-C, and a SIGTERM to all processes, are for the main one to handle: it needs its workers
    for the step that it finishes. A worker ends when its parent says so, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()  # not what forked it, which may be a server
    owner = parent.pid if parent else os.getppid()
    threading.Thread(target=_obey, args=(owner,), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
