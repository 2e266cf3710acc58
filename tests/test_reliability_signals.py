"""SIGTERM and Ctrl-C at any moment: what was learnt is saved, the status is 143 or 130, nothing is
half-written, the run goes on as if nothing had been. A second one ends a process at once."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import ROOT
from runs import (
    Started,
    assert_same,
    at_call,
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
from tiny_tokenizer import shards

BOTH = (signal.SIGTERM, signal.SIGINT)


def sending(number):
    return partial(signal.raise_signal, number)


def launch(folder, words, hooks, processes):
    """Statuses and stderrs of the processes of a run; hooks: by rank."""
    if processes == 1:
        running = [Started(folder, words, hooks.get(0))]
    else:
        running = several(folder, words, processes, hooks)
    ended = [process.wait() for process in running]
    return [status for status, _, _ in ended], [err for _, _, err in ended]


@pytest.mark.parametrize(
    ("task", "processes", "moments"),
    [
        ("vqgan", 1, 4),
        ("maskgit", 1, 4),
        ("maskgit", 2, 3),
        *(
            pytest.param(task, processes, 12, marks=pytest.mark.slow)
            for task in ("vqgan", "maskgit", "clip", "classifier")
            for processes in (1, 2)
        ),
    ],
)
def test_a_signal_at_any_moment(task, processes, moments, tmp_path):
    """From the start on, which makes a transformer's tokens; in steps, validation, saving, drawing.
    Of two processes, to one of them or to both."""
    words = prepare(tmp_path, task, steps=4, save_every=2, validate_every=2, draw_every=2)
    totals = [tmp_path / f"calls{r}" for r in range(processes)]
    counting = {r: partial(at_call, 0, print, totals[r], processes > 1) for r in range(processes)}
    assert set(launch(tmp_path, [*words, "run=whole"], counting, processes)[0]) == {0}
    calls = [int(total.read_text()) for total in totals]
    draw = random.Random(f"{task} {processes} {moments}")
    steps = set()
    for moment in range(moments):
        number, place = draw.choice(BOTH), 0.97 * (1 - draw.random() ** 2.5)  # most is the start
        to = draw.choice([[0], [1], [0, 1]]) if processes > 1 else [0]
        send = sending(number)
        hooks = {r: partial(at_call, int(place * calls[r]), send, None, processes > 1) for r in to}
        what = f"run=r{moment}"
        statuses, errors = launch(tmp_path, [*words, what], hooks, processes)
        assert statuses == [128 + number] * processes, (place, to, errors)
        assert not any("Traceback" in error for error in errors), errors
        folder = tmp_path / f"r{moment}"
        if folder.exists():
            assert leftovers(folder) == []
        if (folder / "checkpoints").exists():
            steps.add(newest(folder)[0])
        assert set(launch(tmp_path, [*words, what], {}, processes)[0]) == {0}
        assert_same(tmp_path / "whole", folder)
    assert len(steps) > 1


# While something takes its time: what a hook makes slow.


def slow_pictures(seconds, after=0):
    """Hook: decoding an image takes so long, but for the first ones of a process."""
    from maskgit.engine import data

    decode, left = data.decode, after

    def slowly(*arguments):
        nonlocal left
        left -= 1
        time.sleep(seconds if left < 0 else 0)
        return decode(*arguments)

    data.decode = slowly


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wait_for_data_that_may_never_come_ends_with_what_was_learnt(workers, tmp_path):
    words = prepare(tmp_path, "classifier", steps=6)
    assert run(tmp_path, [*words, "run=whole"])[0] == 0
    for number, group in ((signal.SIGTERM, False), (signal.SIGINT, True)):
        folder = tmp_path / f"r{number}"
        command = [*words, f"run={folder}", f"data.workers={workers}"]
        started = Started(tmp_path, command, partial(slow_pictures, 600, 11))
        until(
            lambda there=folder / "metrics.jsonl": there.exists() and len(logged(there.parent)) > 1
        )
        time.sleep(0.3)
        started.send(number, group)
        status, out, err = started.wait()
        assert (status, err) == (128 + number, "") and "saved at step 2" in out
        assert run(tmp_path, [*words, f"run={folder}"])[0] == 0
        assert_same(tmp_path / "whole", folder)


@pytest.mark.parametrize("to", [[0], [1], [0, 1]])
def test_of_two_processes_one_may_wait_for_its_data(to, tmp_path):
    words = prepare(tmp_path, "classifier", steps=6)
    hooks = {1: partial(slow_pictures, 0.5, 4)}
    running = several(tmp_path, [*words, "run=own", "data.workers=1"], hooks=hooks)
    until((tmp_path / "own" / "metrics.jsonl").exists)
    for rank in to:
        running[rank].send(signal.SIGTERM, group=True)
    ended = [started.wait() for started in running]
    assert [status for status, _, _ in ended] == [143, 143]
    assert [err for _, _, err in ended] == ["", ""]
    assert 0 < newest(tmp_path / "own")[0] < 6


def endless(name, seen):
    """Hook: this function of the classifier's task takes for ever; a file tells that it began."""
    from maskgit.evaluation.classifier_task import ClassifierTask

    def wait(self, *arguments):
        seen.write_text("")
        time.sleep(600)

    setattr(ClassifierTask, name, wait)


@pytest.mark.parametrize(("name", "processes"), [("validate", 1), ("validate", 2), ("draw", 1)])
def test_validation_and_drawing_end_early(name, processes, tmp_path):
    words = prepare(tmp_path, "classifier", steps=4, **{f"{name}_every": 2}) + ["run=own"]
    seen = tmp_path / "seen"
    if processes == 1:
        running = [Started(tmp_path, words, partial(endless, name, seen))]
    else:
        running = several(tmp_path, words, hooks={0: partial(endless, name, seen)})
    until(seen.exists)
    for started in running:
        started.send(signal.SIGTERM)
    ended = [started.wait() for started in running]
    assert [status for status, _, _ in ended] == [143] * processes, ended
    # The other process heeds the signal in the step that follows.
    assert newest(tmp_path / "own")[0] == 1 + processes if name == "validate" else 2


# A second signal.


def stuck(step, name, seconds=600):
    """Hook: before this step is done, or saved, one sleeps for ever."""
    at_step(step, partial(time.sleep, seconds), name)


@pytest.mark.parametrize("name", ["update", "save"])
def test_a_second_signal_ends_a_process_at_once(name, tmp_path):
    words = [*prepare(tmp_path, "classifier", steps=5, save_every=1), "run=own", "data.workers=1"]
    started = Started(tmp_path, words, partial(stuck, 3, name))
    until(lambda: (tmp_path / "own/checkpoints/step_00000002").exists())
    time.sleep(0.5)
    started.send(signal.SIGTERM)
    time.sleep(0.5)
    assert started.lives
    started.send(signal.SIGINT)
    assert started.wait(60)[0] == 130
    assert newest(tmp_path / "own")[0] in (2, 3)


def test_a_second_signal_ends_a_process_that_waits_for_another(tmp_path):
    """In the middle of a step, in code that is not Python's."""
    words = [*prepare(tmp_path, "classifier", steps=5, save_every=1), "run=own"]
    running = several(tmp_path, words, hooks={1: partial(stuck, 3, "update")})
    until(lambda: (tmp_path / "own/checkpoints/step_00000002").exists())
    time.sleep(0.5)
    for number in (signal.SIGTERM, signal.SIGTERM):
        running[0].send(number)
        time.sleep(0.5)
    assert running[0].wait(60)[0] == 143
    assert running[1].lives  # what it is stuck in is no wait for the other
    running[1].send(signal.SIGKILL)
    running[1].wait()
    assert newest(tmp_path / "own")[0] in (2, 3)


@pytest.mark.parametrize("number", BOTH)
def test_a_process_that_waits_for_others_to_start_ends_at_once(number, tmp_path):
    words = [*prepare(tmp_path, "classifier"), "run=own"]
    alone, other = several(tmp_path, words)
    other.send(signal.SIGKILL)
    time.sleep(2)
    alone.send(number)
    assert alone.wait(60)[0] == 128 + number


# Other work.


@pytest.mark.parametrize("out", ["sheet.png", "folder"])
def test_sampling_leaves_nothing_half_made(out, tmp_path):
    """A sheet, and a folder of images, of a model that a run has just made."""
    words = [*prepare(tmp_path, "maskgit", steps=1), "run=own"]
    assert run(tmp_path, words)[0] == 0
    model = str(tmp_path / "own" / "export")
    command = ["sample", "--model", model, "--num", "3", "--device", "cpu", "--batch-size", "2"]
    total, there = tmp_path / "calls", names(tmp_path)
    hook = partial(at_call, 0, print, total)
    assert run(tmp_path, [*command, "--out", tmp_path / "whole" / out], hook)[0] == 0
    draw = random.Random(out)
    for _ in range(8):
        number, place = draw.choice(BOTH), 0.97 * (1 - draw.random() ** 2)
        hook = partial(at_call, int(place * int(total.read_text())), sending(number))
        status, _, err = run(tmp_path, [*command, "--out", tmp_path / "cut" / out], hook)
        assert status == 128 + number and "Traceback" not in err, err
        assert not (tmp_path / "cut").exists() or names(tmp_path / "cut") == []
    assert set(names(tmp_path)) - {*there, "calls", "whole", "cut"} == set()
    assert run(tmp_path, [*command, "--out", tmp_path / "cut" / out])[0] == 0


def test_tokenizing_goes_on_with_the_next_shard(tmp_path):
    prepare(tmp_path, "maskgit")
    command = ["tokenize", "--data", tmp_path / "photos", "--tokenizer", tmp_path / "vq"]
    command += ["--size", "16", "16", "--shard-images", "3", "--out"]
    total = tmp_path / "calls"
    hook = partial(at_call, 0, print, total)
    assert run(tmp_path, [*command, tmp_path / "whole"], hook)[0] == 0
    draw, seen = random.Random(0), set()
    for moment in range(6):
        number, place = draw.choice(BOTH), 0.97 * (1 - draw.random() ** 3)
        hook = partial(at_call, int(place * int(total.read_text())), sending(number))
        out = tmp_path / f"cut{moment}"
        status, _, err = run(tmp_path, [*command, out], hook)
        assert status == 128 + number and "Traceback" not in err, err
        if out.exists():
            assert leftovers(out) == []
            seen.add(len(shards(out / "train")))
        assert run(tmp_path, [*command, out])[0] == 0
        for split in ("train", "heldout"):
            assert shards(out / split) == shards(tmp_path / "whole" / split)
    assert len(seen) > 1


@pytest.mark.slow
@pytest.mark.parametrize("number", BOTH)
def test_a_signal_while_python_starts(number, tmp_path):
    """From outside, and without what the other tests have loaded beforehand."""
    words = [*prepare(tmp_path, "classifier", steps=10_000, save_every=1), "run=own"]
    draw = random.Random(number)
    command = [sys.executable, "-m", "maskgit", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(4):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        time.sleep(1 + 6 * draw.random())
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 128 + number and "Traceback" not in err, err
        if (tmp_path / "own").exists():
            assert leftovers(tmp_path / "own") == []
    assert run(tmp_path, [*words, "train.steps=1", "--restart"])[0] == 0
