"""Whatever happens to a run, the next one goes on from a complete checkpoint: kills, full disks,
flipped bytes. Each run is a process of its own, by the command that people give."""

import json
import os
import random
import resource
import shutil
import signal
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from runs import (
    Started,
    assert_same,
    at_step,
    folders,
    leftovers,
    logged,
    newest,
    prepare,
    run,
    until,
)

from maskgit import Pipeline
from maskgit.engine import checkpoint
from vqgan import VQGAN

OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def limit(size):
    """No file of this process may grow beyond `size` bytes; None: any may."""
    most = resource.RLIM_INFINITY if size is None else max(0, size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def kill_at_byte(number, step, told=False):
    """Hook: at byte `number` of the checkpoint of a step the process is no more; or, if `told`,
    the disk is full there."""
    if not told:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    write = checkpoint.write_tensors

    def limited(path, *arguments):
        if path.parent.name.endswith(f"{step:08d}"):
            limit(number - sum(file.stat().st_size for file in path.parent.iterdir()))
        write(path, *arguments)

    checkpoint.write_tensors = limited


def saving(step, operation):
    """Hook: call `operation` before each change to the files of a run while it saves at `step`,
    with the number of the change."""
    from maskgit.engine.state import State

    save, numbers, now = State.save, count(), []

    def watched(self, run, done, *arguments):
        now.append(done == step)
        save(self, run, done, *arguments)
        now.append(False)

    def heard(event, arguments):
        if not now or not now[-1] or event not in OPERATIONS:
            return
        if event != "open" or (isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
            now.append(False)  # what is done now counts for nothing
            operation(next(numbers))
            now.pop()

    State.save = watched
    sys.addaudithook(heard)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


# Kills.


def test_a_kill_at_any_byte_of_a_checkpoint_loses_that_checkpoint_alone(tmp_path):
    words = prepare(tmp_path, steps=23, save_every=1)
    assert run(tmp_path, [*words, "run=whole"])[0] == 0
    last = tmp_path / "whole" / "checkpoints" / "step_00000023"
    sizes = [(last / file).stat().st_size for file in json.loads(_read(last))["files"]]
    manifest = (last / checkpoint.MANIFEST).stat().st_size
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    draw = random.Random(0)
    offsets = [0, 1, 7, 8, starts[1] - 1, starts[2] + 9, starts[-1], starts[-1] + manifest - 1]
    offsets += [draw.randrange(starts[-1] + manifest) for _ in range(12)]
    folder = tmp_path / "killed" / "checkpoints"
    for step, offset in enumerate(offsets, 2):
        hook = partial(kill_at_byte, offset, step)
        status, out, err = run(tmp_path, [*words, "run=killed"], hook)
        assert status == -signal.SIGXFSZ, err
        assert ("never completed" in out) == (step > 2) == ("resuming" in out)
        partial_folder = folder / f".partial-step_{step:08d}"
        written = sum(file.stat().st_size for file in partial_folder.iterdir())
        assert written == offset
        assert newest(tmp_path / "killed")[0] == step - 1
    status, out, _ = run(tmp_path, [*words, "run=killed"])
    assert status == 0 and f"removed {partial_folder}: never completed" in out.replace(
        "removed killed", f"removed {tmp_path}/killed"
    )
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert folders(folder) == folders(tmp_path / "whole" / "checkpoints")


def _read(folder):
    return (folder / checkpoint.MANIFEST).read_text()


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["vqgan", "maskgit"])
def test_a_kill_between_any_two_changes_to_the_files_of_a_save(task, all_of_them, tmp_path):
    """While the new checkpoint is written, renamed, while an old one is renamed and removed, while
    the export's files are written and renamed."""
    words = prepare(tmp_path, task, save_every=1, steps=4)
    seen = tmp_path / "seen"
    noting = partial(saving, 4, partial(_note, seen))
    assert run(tmp_path, [*words, "run=whole"], noting)[0] == 0
    operations = int(seen.read_text()) + 1
    assert operations > 20
    numbers = list(range(operations))
    if not all_of_them:
        numbers = sorted(random.Random(1).sample(numbers, 5))
    load = VQGAN.from_pretrained if task == "vqgan" else partial(Pipeline.from_pretrained)
    killed, step, completed = tmp_path / "killed", 0, 0
    for number in numbers:
        # Of each run the third save, when there is an old checkpoint to be removed.
        hook = partial(saving, step + 3, partial(_kill_at, number))
        status, out, err = run(tmp_path, [*words, "run=killed", f"train.steps={step + 9}"], hook)
        assert status == -signal.SIGKILL, (number, out, err)
        before, step = step, newest(killed)[0]
        assert step in (before + 2, before + 3)
        completed += step == before + 3
        load(killed / "export")
        left = leftovers(killed)
        aside = tmp_path / "aside"
        shutil.copytree(killed, aside)
        status, out, err = run(tmp_path, [*words, "run=aside", f"train.steps={step + 1}"])
        assert status == 0 and leftovers(aside) == [], err
        assert [path for path in left if path not in out] == []
        shutil.rmtree(aside)
    assert 0 < completed < len(numbers)
    for name in ("whole", "killed"):
        assert run(tmp_path, [*words, f"run={name}", f"train.steps={step + 2}"])[0] == 0
    assert_same(tmp_path / "whole", killed)


def _note(path, number):
    path.write_text(f"{number}")


def _kill_at(last, number):
    if number == last:
        kill()


def test_a_kill_while_the_first_export_is_written_leaves_none(tmp_path):
    words = prepare(tmp_path, "maskgit", save_every=1, steps=2)
    for number in range(12, 24, 2):
        run(tmp_path, [*words, f"run=r{number}"], partial(saving, 1, partial(_kill_at, number)))
        export = tmp_path / f"r{number}" / "export"
        if export.exists():
            Pipeline.from_pretrained(export)
    assert {(tmp_path / f"r{number}" / "export").exists() for number in range(12, 24, 2)} == {
        True,
        False,
    }
