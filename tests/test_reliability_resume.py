"""A run goes on exactly as if it had never stopped: all tasks, whatever reads the data, however the
batch is shared; and it goes on with what it was begun with, or not at all."""

import os
import signal

import pytest
import yaml
from runs import (
    assert_same,
    at_step,
    leftovers,
    logged,
    names,
    newest,
    prepare,
    run,
    several,
    until,
)

from clip import CLIP
from maskgit import Pipeline
from maskgit.common.folder import LOCK
from maskgit.engine import checkpoint
from vqgan import VQGAN

EXPORTED = {"vqgan": VQGAN, "maskgit": Pipeline, "clip": CLIP}


def stopped(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


# Epochs have 5 steps of 4 pictures: step 4 is within the first, and 7 within the second.
@pytest.mark.parametrize(
    "words",
    [(), ("train.micro_batch=2", "data.workers=2")],
    ids=["plain", "micro-batches and workers"],
)
@pytest.mark.parametrize("task", ["vqgan", "maskgit", "classifier", "clip"])
def test_a_run_that_was_stopped_twice_ends_as_one_that_was_not(task, words, tmp_path):
    command = [*prepare(tmp_path, task, steps=10), *words]
    if task == "maskgit":
        command = [word for word in command if "workers" not in word]
    status, *_ = run(tmp_path, [*command, "run=whole"])
    assert status == 0
    for step in (4, 7):
        status, out, _ = run(tmp_path, [*command, "run=parts"], at_step_hook(step))
        assert status == 143 and f"saved at step {step + 1}" in out
    status, out, _ = run(tmp_path, [*command, "run=parts"])
    assert status == 0 and "resuming parts at step 8" in out
    assert_same(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (
        {
            (line["step"], key): value
            for line in logged(tmp_path / folder)
            for key, value in line.items()
            if not key.endswith(("_per_second", "_matrix_rate"))
        }
        for folder in ("whole", "parts")
    )
    assert parts == whole and leftovers(tmp_path / "parts") == []
    if task in EXPORTED:
        EXPORTED[task].from_pretrained(tmp_path / "parts" / "export")


def at_step_hook(step):
    """Picklable, as what starts a process has to be."""
    return _Hook(step)


class _Hook:
    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def __call__(self):
        at_step(self.step, stopped(self.number))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqgan", "maskgit", "classifier", "clip"])
def test_two_processes_go_on_exactly_and_one_goes_on_with_their_run(task, tmp_path):
    command = prepare(tmp_path, task, steps=10)

    def both(folder, hooks=None):
        return [p.wait() for p in several(tmp_path, [*command, f"run={folder}"], hooks=hooks)]

    assert [status for status, *_ in both("whole")] == [0, 0]
    assert [status for status, *_ in both("parts", {1: _Hook(4)})] == [143, 143]
    assert [status for status, *_ in both("parts")] == [0, 0]
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert [status for status, *_ in both("mixed", {0: _Hook(4)})] == [143, 143]
    status, out, _ = run(tmp_path, [*command, "run=mixed"])
    assert status == 0 and "2 processes before, 1 now: the same samples in the same order" in out
    assert newest(tmp_path / "mixed")[0] == 10


# A config that differs.


def test_what_may_change_goes_through_and_what_may_not_is_told_by_field(tmp_path):
    command = [*prepare(tmp_path, "classifier", steps=2), "run=own"]
    assert run(tmp_path, command)[0] == 0
    free = ["train.steps=3", "train.log_every=2", "train.keep_last=1", "train.micro_batch=2"]
    free += ["data.workers=1", "train.save_minutes=1", "train.activation_checkpointing=true"]
    status, out, err = run(tmp_path, [*command, *free])
    assert status == 0 and "resuming own at step 2" in out, err
    before = newest(tmp_path / "own")
    status, _, err = run(tmp_path, [*command, "train.lr=0.5", "model.groups=2", "train.steps=9"])
    assert status == 2 and len(err.splitlines()) == 1
    for part in ("train.lr: 0.001, now 0.5", "model.groups: 4, now 2", "--restart", "init=own"):
        assert part in err
    assert "train.steps" not in err
    assert newest(tmp_path / "own")[0] == before[0]


def test_restart_moves_the_old_run_aside_and_init_goes_on_from_its_weights(tmp_path):
    command = [*prepare(tmp_path, "classifier", steps=2), "run=own"]
    assert run(tmp_path, command)[0] == 0
    kept = names(tmp_path / "own")
    status, out, _ = run(tmp_path, [*command, "--restart", "train.lr=0.5"])
    assert status == 0 and "own.1" in out and "resuming" not in out
    assert [name for name in kept if name != LOCK] == names(tmp_path / "own.1")
    settings = yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())
    assert settings["train"]["lr"] == 0.5
    more = ["run=more", "init=own.1/export", "train.lr=1e-12", "train.ema=0"]
    assert run(tmp_path, [*command, *more])[0] == 0
    before = checkpoint.newest(tmp_path / "own.1" / "checkpoints")[0]["average"]
    after = checkpoint.newest(tmp_path / "more" / "checkpoints")[0]["average"]
    assert all((after[name] - before[name]).abs().max() < 1e-9 for name in before)


def test_what_is_learnt_from_is_known_by_its_content(tmp_path):
    command = [*prepare(tmp_path, "maskgit", steps=2), "run=own"]
    assert run(tmp_path, command)[0] == 0
    (tmp_path / "photos").rename(tmp_path / "pictures")
    (tmp_path / "vq").rename(tmp_path / "codes")
    moved = [f"data.path={tmp_path / 'pictures'}", f"tokenizer={tmp_path / 'codes'}"]
    status, out, err = run(tmp_path, [*command, *moved, "train.steps=3"])
    assert status == 0 and "resuming own at step 2" in out, err
    more = tmp_path / "pictures" / "left" / "another.png"
    more.write_bytes(next((tmp_path / "pictures").rglob("*.png")).read_bytes())
    (tmp_path / "own" / "tokens").rename(tmp_path / "old")
    status, _, err = run(tmp_path, [*command, *moved, "train.steps=4"])
    assert status == 2 and "begun with other data than" in err.splitlines()[-1]
    assert "--restart" in err and newest(tmp_path / "own")[0] == 3


def test_a_setting_that_there_was_none_of_yet_had_its_default(tmp_path):
    command = [*prepare(tmp_path, "classifier", steps=2), "run=own"]
    assert run(tmp_path, command)[0] == 0
    file = tmp_path / "own" / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    del settings["train"]["eps"]
    file.write_text(yaml.safe_dump(settings))
    status, _, err = run(tmp_path, [*command, "train.steps=3", "train.eps=1e-3"])
    assert status == 2 and "train.eps: 1e-08, now 0.001" in err
    assert run(tmp_path, [*command, "train.steps=3"])[0] == 0


def test_what_a_run_started_from_need_not_stay(tmp_path):
    command = prepare(tmp_path, "classifier", steps=2)
    assert run(tmp_path, [*command, "run=first"])[0] == 0
    command += ["run=own", "init=first/export"]
    assert run(tmp_path, command)[0] == 0
    (tmp_path / "first").rename(tmp_path / "gone")
    assert run(tmp_path, [*command, "train.steps=3"])[0] == 0


# Two runs on one folder.


def test_a_second_run_on_a_folder_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    from runs import Started

    command = [*prepare(tmp_path, "classifier", steps=100_000), "run=own", "data.workers=1"]
    first = Started(tmp_path, command)
    until((tmp_path / "own" / "metrics.jsonl").exists)
    status, _, err = run(tmp_path, command)
    assert status == 2 and len(err.splitlines()) == 1
    assert "own is in use by another process" in err and str(first.pid) in err
    assert first.lives
    first.send(signal.SIGKILL)
    assert first.wait()[0] == -signal.SIGKILL
    status, _, err = run(tmp_path, [*command, "train.steps=1"])
    assert status == 0, err


# A loss that is not finite, in one of two processes.


class _Poison:
    """In the process that it is for, the loss of step 3 is not a number."""

    def __call__(self):
        from maskgit.evaluation.classifier_task import ClassifierTask

        step, loss = ClassifierTask.step, ClassifierTask.loss

        def noted(self, batches, number):
            self.number = number
            return step(self, batches, number)

        def poisoned(self, batch):
            value, weight, logs = loss(self, batch)
            return value * (float("nan") if self.number == 3 else 1.0), weight, logs

        ClassifierTask.step, ClassifierTask.loss = noted, poisoned


def test_a_loss_that_is_not_finite_in_one_of_two_processes_stops_both(tmp_path):
    command = [*prepare(tmp_path, "classifier", steps=6, save_every=2), "run=own"]
    (status, _, err), (other, _, rest) = (
        started.wait() for started in several(tmp_path, command, hooks={1: _Poison()})
    )
    assert (status, other) == (2, 2) and rest == ""
    line = err.splitlines()[-1]
    assert "classifier is not finite at step 3" in line and "the last checkpoint is kept" in line
    samples = line.partition("samples [")[2].partition("]")[0].split(",")
    assert len(samples) == 2  # those of the second process alone
    assert newest(tmp_path / "own")[0] == 2
    assert [p.wait()[0] for p in several(tmp_path, command)] == [0, 0]
    assert [p.wait()[0] for p in several(tmp_path, [*command, "run=clean"])] == [0, 0]
    assert_same(tmp_path / "own", tmp_path / "clean")
