"""SIGTERM and Ctrl-C at any moment: what was learnt is saved, the status is 143 or 130, nothing is
half-written, the run goes on as if nothing had been. A second one ends a process at once."""

import random
import signal
import time
from functools import partial

import pytest
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
    raise_at,
    run,
    sending,
    several,
    until,
    while_saving,
)

BOTH = TERM, INT = signal.SIGTERM, signal.SIGINT


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
        ("vqgan", 1, 3),
        ("maskgit", 1, 3),
        ("maskgit", 2, 2),
        *(
            pytest.param(task, processes, 10, marks=pytest.mark.slow)
            for task in ("vqgan", "maskgit", "clip")
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
        # Spread over all of it, and more over the steps: most of the calls are those of the start
        # and of the first step, whose work is counted.
        place = 0.97 * (1 - ((moment + draw.random()) / moments) ** 5)
        number = draw.choice(BOTH)
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
    assert len(steps) >= min(3, moments // 3)


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


@pytest.mark.parametrize(("workers", "number"), [(0, TERM), (1, INT)])
def test_a_wait_for_data_that_may_never_come_ends_with_what_was_learnt(workers, number, tmp_path):
    words = prepare(tmp_path, "classifier", steps=6)
    assert run(tmp_path, [*words, "run=whole"])[0] == 0
    command = [*words, "run=own", f"data.workers={workers}"]
    started = Started(tmp_path, command, partial(slow_pictures, 600, 11))
    lines = tmp_path / "own" / "metrics.jsonl"
    until(lambda: lines.exists() and len(logged(tmp_path / "own")) > 1)
    time.sleep(0.3)
    started.send(number, group=number == INT)  # as Ctrl-C reaches the workers too
    status, out, err = started.wait()
    assert (status, err) == (128 + number, "") and "saved at step 2" in out
    assert run(tmp_path, command)[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "own")


@pytest.mark.parametrize("to", [[0], [1], [0, 1]])
def test_of_two_processes_one_may_wait_for_its_data(to, tmp_path):
    words = prepare(tmp_path, "classifier", steps=6)
    hooks = {1: partial(slow_pictures, 0.5, 4)}
    running = several(tmp_path, [*words, "run=own", "data.workers=1"], hooks=hooks)
    until((tmp_path / "own" / "metrics.jsonl").exists)
    for rank in to:
        running[rank].send(TERM, group=True)
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
        started.send(TERM)
    ended = [started.wait() for started in running]
    assert [status for status, _, _ in ended] == [143] * processes, ended
    # The other process heeds the signal in the step that follows.
    assert newest(tmp_path / "own")[0] == 1 + processes if name == "validate" else 2


def test_a_save_goes_to_its_end(tmp_path):
    words = prepare(tmp_path, "classifier", steps=5, save_every=2, keep_last=1)
    assert run(tmp_path, [*words, "run=whole"])[0] == 0
    for change, number in ((0, TERM), (6, INT), (11, TERM)):
        hook = partial(while_saving, 4, partial(raise_at, change, number))
        status, out, err = run(tmp_path, [*words, f"run=r{change}"], hook)
        assert (status, err) == (128 + number, "") and "saved at step 4" in out
        folder = tmp_path / f"r{change}"
        assert newest(folder)[0] == 4 and leftovers(folder) == []
        assert names(folder / "checkpoints") == ["step_00000004"]
        assert run(tmp_path, [*words, f"run=r{change}"])[0] == 0
        assert_same(tmp_path / "whole", folder)


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
    started.send(TERM)
    time.sleep(0.5)
    assert started.lives
    started.send(INT)
    assert started.wait(60)[0] == 130
    assert newest(tmp_path / "own")[0] in (2, 3)


def test_a_second_signal_ends_a_process_that_waits_for_another(tmp_path):
    """In the middle of a step, in code that is not Python's."""
    words = [*prepare(tmp_path, "classifier", steps=5, save_every=1), "run=own"]
    running = several(tmp_path, words, hooks={1: partial(stuck, 3, "update")})
    until(lambda: (tmp_path / "own/checkpoints/step_00000002").exists())
    time.sleep(0.5)
    for number in (TERM, TERM):
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
