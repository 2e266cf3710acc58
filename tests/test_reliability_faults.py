"""What may go wrong in the middle of a run: broken images, workers that die, gradients that are not
finite; and what has to hold all along: an export that loads, few checkpoints, flat memory."""

import json
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import yaml
from runs import Started, assert_same, at_step, logged, newest, prepare, run, several, until

from maskgit import Pipeline
from maskgit.engine import checkpoint
from maskgit.engine.data import DataConfig, batches, open_images
from maskgit.evaluation.classifier import Classifier
from vqgan import VQGAN

# Images.


def spoil(words, step):
    """Break the picture that first comes in a step of the run, and not before; gives its path."""
    images = open_images(DataConfig(**yaml.safe_load(Path(words[1]).read_text())["data"]))
    stream, seen = batches(images, 4), set()
    for _ in range(step):
        seen |= set(next(stream)["index"].tolist())
    new = set(next(stream)["index"].tolist()) - seen
    path = Path(images.items[min(new)].where)
    path.write_bytes(path.read_bytes()[:60])  # a PNG that ends in the middle
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_told_by_path_and_too_many_stop_the_run(workers, tmp_path):
    words = [*prepare(tmp_path, "classifier", steps=6), f"data.workers={workers}"]
    path = spoil(words, 3)
    status, _, err = run(tmp_path, [*words, "run=own"])
    assert status == 2
    [line] = [line for line in err.splitlines() if line.startswith("maskgit:")]
    assert "1 of 22 files cannot be used" in line and str(path) in line and "max_broken" in line
    assert newest(tmp_path / "own")[0] == 3  # what was learnt is saved
    status, out, err = run(tmp_path, [*words, "run=own", "data.max_broken=0.1"])
    assert status == 0 and "resuming own at step 3" in out
    assert f"skipped {path}" in err
    assert run(tmp_path, [*words, "run=whole", "data.max_broken=0.1"])[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "own")


def kill_workers(number=signal.SIGKILL):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)


def test_a_worker_that_is_killed_does_not_hang_the_run(tmp_path):
    words = [*prepare(tmp_path, "classifier", steps=30), "data.workers=2"]
    assert run(tmp_path, [*words, "run=whole"])[0] == 0
    status, _, err = run(tmp_path, [*words, "run=own"], partial(at_step, 2, kill_workers))
    assert status == 1
    [line] = err.splitlines()
    assert line.startswith("maskgit: a data worker died (SIGKILL)") and "data.workers=2" in line
    step = newest(tmp_path / "own")[0]
    assert 3 <= step < 30 and logged(tmp_path / "own")[-1]["step"] == step
    assert run(tmp_path, [*words, "run=own"])[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "own")


def test_of_two_processes_none_waits_for_one_whose_worker_was_killed(tmp_path):
    words = [*prepare(tmp_path, "classifier", steps=30, save_every=1), "data.workers=1", "run=own"]
    running = several(tmp_path, words, hooks={1: partial(at_step, 2, kill_workers)})
    (first, _, told), (second, _, why) = (started.wait() for started in running)
    assert (first, second) == (1, 1)
    assert len(told.splitlines()) == 1 and "another process of this run has ended" in told
    assert len(why.splitlines()) == 1 and "a data worker died (SIGKILL)" in why
    assert 3 <= newest(tmp_path / "own")[0] < 30


# What is not finite.


def poison(step):
    """Hook: at a step the loss is finite, and its gradient is not."""
    from maskgit.task import MaskGITTask

    loss, now = MaskGITTask.loss, []
    at_step(step, partial(now.append, step))

    def poisoned(self, batch):
        value, weight, logs = loss(self, batch)
        if now:
            value = value + (self.parts["transformer"].net.head_bias * 0).abs().sum().sqrt()
        return value, weight, logs

    MaskGITTask.loss = poisoned


@pytest.mark.parametrize("processes", [1, 2])
def test_a_gradient_that_is_not_finite_stops_all_before_the_update(processes, tmp_path):
    words = [*prepare(tmp_path, "maskgit", steps=5, save_every=2), "run=own"]
    if processes == 1:
        running = [Started(tmp_path, words, partial(poison, 3))]
    else:
        running = several(tmp_path, words, hooks={1: partial(poison, 3)})
    ended = [started.wait() for started in running]
    assert [status for status, _, _ in ended] == [2] * processes
    [line] = [line for line in ended[0][2].splitlines() if line.startswith("maskgit:")]
    assert "gradient of transformer is not finite at step 3 (samples [" in line
    assert newest(tmp_path / "own")[0] == 2 and logged(tmp_path / "own")[-1]["step"] == 3
    assert run(tmp_path, words)[0] == 0 and newest(tmp_path / "own")[0] == 5


# What has to hold all along.


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    settings = dict(steps=12, save_every=2, validate_every=1, keep_last=2, keep_best=True, lr=0.01)
    words = [*prepare(tmp_path, "classifier", **settings), "run=own"]
    assert run(tmp_path, words)[0] == 0
    kept = checkpoint.steps(tmp_path / "own" / "checkpoints")
    found = {path: checkpoint.read_manifest(path)["score"] for path in kept}
    scores = {line["step"]: line["heldout/top1"] for line in logged(tmp_path / "own")}
    assert len(scores) == 12 and len(set(scores.values())) > 1
    assert {int(path.name[-2:]): score for path, score in found.items()}.items() <= scores.items()
    assert max(scores.values()) in found.values()
    assert kept[-1].name.endswith("12") and len(kept) in (2, 3)
    Classifier.from_pretrained(tmp_path / "own" / "best")


@pytest.mark.parametrize("task", ["vqgan", "maskgit"])
def test_the_export_can_be_loaded_at_every_moment(task, tmp_path):
    """Also right after kills of the run, some of which come in the middle of one."""
    words = [*prepare(tmp_path, task, steps=10_000, save_every=1), "run=own"]
    load = VQGAN.from_pretrained if task == "vqgan" else Pipeline.from_pretrained
    export, checkpoints, loaded = tmp_path / "own" / "export", tmp_path / "own" / "checkpoints", 0
    for last in (6, 12, 18):
        started = Started(tmp_path, words)
        until(export.exists)
        while started.lives and max(checkpoint.steps(checkpoints)).name < f"step_{last:08}":
            load(export)
            loaded += 1
        started.send(signal.SIGKILL)
        load(export)
        assert started.wait()[0] == -signal.SIGKILL
        load(export)
    assert loaded > 9


def test_a_killed_run_leaves_no_lock_though_its_workers_live_on(tmp_path):
    words = [*prepare(tmp_path, "classifier", steps=3), "data.workers=1", "run=own"]
    first = Started(tmp_path, [*words, "train.steps=100000"])
    until((tmp_path / "own" / "metrics.jsonl").exists)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    [worker] = map(int, children)
    os.kill(worker, signal.SIGSTOP)  # so that it cannot see that its parent is gone
    [(status, _, err), (second, _, rest)] = [p.wait() for p in several(tmp_path, words)]
    assert (status, second) == (2, 2) and rest == ""
    assert len(err.splitlines()) == 1 and f"in use by another process ({first.pid})" in err
    first.send(signal.SIGKILL)
    assert first.wait()[0] == -signal.SIGKILL
    assert Path(f"/proc/{worker}").exists()
    assert run(tmp_path, words)[0] == 0 and newest(tmp_path / "own")[0] == 3
    os.kill(worker, signal.SIGKILL)


# Long runs.


def measured(file):
    """Hook: at every hundredth step a line with resident bytes, threads and open files."""
    from maskgit.engine.state import State

    update = State.update

    def counted(self, batch, step, *arguments):
        if step % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            numbers = (pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/task")))
            with file.open("a") as lines:
                lines.write(json.dumps([step, *numbers, len(os.listdir("/proc/self/fd"))]) + "\n")
        return update(self, batch, step, *arguments)

    State.update = counted


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqgan", "maskgit"])
def test_two_thousand_steps_take_no_more_memory_threads_or_files(task, tmp_path):
    settings = dict(steps=2000, log_every=10, save_every=100, validate_every=100, draw_every=200)
    words = [*prepare(tmp_path, task, **settings), "run=own", "train.trackers=[tensorboard]"]
    if task == "vqgan":
        words += ["data.workers=1", "loss.r1_every=16"]
    status, _, err = Started(tmp_path, words, partial(measured, tmp_path / "seen")).wait(600)
    assert status == 0, err
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    warm = [numbers for step, *numbers in seen if 400 <= step < 800]
    late = [numbers for step, *numbers in seen if step >= 1600]
    resident, threads, _ = (max(column) for column in zip(*warm, strict=True))
    assert max(numbers[0] for numbers in late) < 1.02 * resident, seen
    assert max(numbers[1] for numbers in late) <= threads, seen
    # TensorBoard's thread opens its file for each write, at some looks and not at others.
    assert min(numbers[2] for numbers in late) <= min(numbers[2] for numbers in warm), seen
