"""Workers that decode images: what kills them, what does not, and that none stays behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, one_line
from pictures import config, make_folder

from maskgit.common import RunError
from maskgit.engine.data import batches, in_order, open_images
from maskgit.engine.loader import load

# Takes batches of two workers as the training loop does, with a step of a quarter of a second.
TRAINER = """
import multiprocessing, signal, sys, time
from maskgit.engine.data import DataConfig, batches, open_images

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(time.monotonic()))
images = open_images(DataConfig(path=sys.argv[1], size=[16, 16], heldout=0))
stream = batches(images, 4, workers=2)
for step, batch in enumerate(stream):
    if step == 0:
        print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    time.sleep(0.25)
    print(step, len(batch["index"]), flush=True)
    if sys.argv[2] == "fail" and step == 2:
        raise ValueError("with the batches still open")
    if stopped and time.monotonic() > stopped[0] + 2:
        sys.exit(143)
"""


@pytest.fixture
def images(tmp_path):
    return open_images(config(make_folder(tmp_path / "set", ["a", "b"], 8), heldout=0))


@pytest.fixture
def trainer(images, tmp_path):
    """Starts TRAINER in a process group of its own; gives it and the ids of its workers."""
    begun = []

    def start(mode):
        command = [sys.executable, "-c", TRAINER, str(tmp_path / "set"), mode]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2 and all(map(lives, workers))
        return process, workers

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_for(condition, seconds=60):
    """Not a bound on time, but on hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_told_in_one_line_and_only_when_a_batch_is_asked_for(images, number):
    handler = signal.getsignal(signal.SIGCHLD)
    stream = batches(images, 4, workers=2)
    next(stream)
    killed, other = multiprocessing.active_children()
    os.kill(killed.pid, number)
    wait_for(lambda: not lives(killed.pid))
    assert signal.getsignal(signal.SIGCHLD) is handler
    with pytest.raises(RunError, match="a data worker died") as error:
        for _ in range(20):
            next(stream)
    one_line(error, number.name, "out of memory?", "last checkpoint", "data.workers=2")
    assert error.value.status == 1
    stream.close()
    del stream, error  # the traceback holds it, too
    wait_for(lambda: not lives(other.pid))


class Uneven:
    """Images of different sizes, which make no batch; and one that cannot be had."""

    def get(self, index, draw, seed):
        if index > 2:
            raise FileNotFoundError("of its own")
        return {"image": torch.zeros(3, 8, 8 + index), "label": 0, "index": index, "broken": {}}

    def report(self, broken):
        assert not broken


def test_a_mistake_in_a_worker_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)in DataLoader worker process 0.*torch.stack"):
        next(load(Uneven(), [[(0, 0), (1, 1)]], seed=0, workers=1))
    with pytest.raises(FileNotFoundError, match=r"(?s)in DataLoader worker process 0.*of its own"):
        next(load(Uneven(), [[(3, 0)]], seed=0, workers=1))
    assert len(next(load(Uneven(), [[(2, 0), (2, 1)]], seed=0, workers=1))["image"]) == 2


def test_workers_end_with_the_batches(images):
    before = set(multiprocessing.active_children())
    whole = list(in_order(images, 4, workers=2))
    stream = batches(images, 4, workers=2)
    next(stream)
    started = set(multiprocessing.active_children()) - before
    assert len(whole) == 4 and len(started) == 2
    stream.close()
    wait_for(lambda: not any(process.is_alive() for process in started))


def test_a_signal_to_all_leaves_the_workers_to_the_main_process(trainer):
    process, workers = trainer("train")
    process.stdout.readline()
    for number in (signal.SIGTERM, signal.SIGINT):
        for worker in workers:
            os.kill(worker, number)
    os.killpg(process.pid, signal.SIGTERM)
    steps = process.stdout.read().splitlines()
    assert process.wait(timeout=60) == 143, process.stderr.read()
    assert len(steps) >= 4  # two seconds of them after the signal
    assert steps == [f"{1 + i} 4" for i in range(len(steps))]
    assert not any(map(lives, workers))


def test_workers_do_not_outlive_a_killed_main_process(trainer):
    process, workers = trainer("train")
    process.kill()
    process.wait(timeout=60)
    wait_for(lambda: not any(map(lives, workers)))


def test_an_error_ends_the_process_whatever_still_holds_the_batches(trainer):
    process, workers = trainer("fail")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "with the batches still open" in errors
    assert not any(map(lives, workers))
