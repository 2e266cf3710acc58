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
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import (
    assert_same,
    at_step,
    leftovers,
    logged,
    names,
    newest,
    prepare,
    run,
    while_saving,
    writes,
)

from maskgit import Pipeline
from maskgit.common import UserError
from maskgit.engine import checkpoint
from vqgan import VQGAN


def limit(size):
    """No file of this process may grow beyond `size` bytes from now on."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(0, size), hard))


def end_at_byte(number, folder, killed):
    """Hook: at byte `number` of what is written into a folder of this name, counted over its files,
    the process is killed; or, if not, the disk is full there."""
    if killed:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def heard(event, arguments):
        if event == "open" and writes(arguments) and Path(arguments[0]).parent.name == folder:
            limit(number - size_of(Path(arguments[0]).parent))

    sys.addaudithook(heard)


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def offsets(folder, draw, random_ones):
    """Bytes of a checkpoint worth a look: in headers, at the ends of files, in the manifest; and
    some at random."""
    files = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
    starts = [0]
    for name in files:
        starts.append(starts[-1] + (folder / name).stat().st_size)
    last = size_of(folder) - 2  # of the manifest's bytes a step below 10 takes one less
    found = [0, 1, 8, starts[1] - 1, starts[2] + 9, starts[-1], starts[-1] + 20, last]
    return found + [draw.randrange(last) for _ in range(random_ones)]


def note_in(file, number):
    file.write_text(f"{number}")


def kill_at(last, number):
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)


# Kills.


def test_a_kill_at_any_byte_of_a_checkpoint_loses_that_checkpoint_alone(tmp_path):
    words = prepare(tmp_path, "classifier", steps=23, save_every=1)
    assert run(tmp_path, [*words, "run=whole"])[0] == 0
    places = offsets(tmp_path / "whole/checkpoints/step_00000023", random.Random(0), 12)
    assert len(places) == 20
    left = ""
    for step, place in enumerate(places, 2):
        hook = partial(end_at_byte, place, f".partial-step_{step:08d}", True)
        status, out, err = run(tmp_path, [*words, "run=killed"], hook)
        assert status == -signal.SIGXFSZ, err
        assert ("resuming killed at step" in out) == (step > 2)
        assert step == 2 or f"removed {left}: never completed" in out
        left = f"killed/checkpoints/.partial-step_{step:08d}"
        assert size_of(tmp_path / left) == place
        assert newest(tmp_path / "killed")[0] == step - 1
    status, out, _ = run(tmp_path, [*words, "run=killed"])
    assert status == 0 and f"removed {left}: never completed" in out
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert names(tmp_path / "killed/checkpoints") == ["step_00000022", "step_00000023"]


@pytest.mark.parametrize("most", [4, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["vqgan", "maskgit"])
def test_a_kill_between_any_two_changes_to_the_files_of_a_save(task, most, tmp_path):
    """While a checkpoint is written or renamed, an old one renamed or removed, the files of the
    export written or renamed, and between all these."""
    words = prepare(tmp_path, task, save_every=1)
    noting = partial(while_saving, 4, partial(note_in, tmp_path / "changes"))
    assert run(tmp_path, [*words, "run=whole", "train.steps=4"], noting)[0] == 0
    changes = list(range(1 + int((tmp_path / "changes").read_text())))
    assert len(changes) > 20
    chosen = sorted(random.Random(task).sample(changes, most)) if most else changes
    load = VQGAN.from_pretrained if task == "vqgan" else Pipeline.from_pretrained
    killed, step, left, completed = tmp_path / "killed", 0, [], 0
    for number in chosen:
        steps = f"train.steps={step + 9}"  # and killed at the third, when an old one has to go
        hook = partial(while_saving, step + 3, partial(kill_at, number))
        status, out, err = run(tmp_path, [*words, "run=killed", steps], hook)
        assert status == -signal.SIGKILL, (number, out, err)
        assert [path for path in left if f"removed killed/{path}: " not in out] == []
        before, step, left = step, newest(killed)[0], leftovers(killed)
        assert step in (before + 2, before + 3)
        completed += step == before + 3
        load(killed / "export")
    assert 0 < completed < len(chosen)
    for name in ("whole", "killed"):
        assert run(tmp_path, [*words, f"run={name}", f"train.steps={step + 2}"])[0] == 0
    assert_same(tmp_path / "whole", killed)
    assert leftovers(killed) == []


def test_the_first_export_is_whole_or_not_there(tmp_path):
    words = prepare(tmp_path, "maskgit", save_every=1, steps=1)
    noting = partial(while_saving, 1, partial(note_in, tmp_path / "changes"))
    assert run(tmp_path, [*words, "run=whole"], noting)[0] == 0
    last = int((tmp_path / "changes").read_text())
    for number in (last - 6, last - 1, last):
        hook = partial(while_saving, 1, partial(kill_at, number))
        status, _, err = run(tmp_path, [*words, f"run=r{number}"], hook)
        assert status == -signal.SIGKILL, err
        export = tmp_path / f"r{number}/export"
        assert not export.exists()
        left = names(tmp_path / f"r{number}")
        assert ".partial-export" in left
        status, out, err = run(tmp_path, [*words, f"run=r{number}"])
        assert status == 0 and f"removed r{number}/.partial-export: never completed" in out, err
        Pipeline.from_pretrained(export)


# Full disks.


def full(part, size):
    """Hook: files with `part` in their path can have no more than `size` bytes."""

    def heard(event, arguments):
        if event == "open" and writes(arguments):
            limit(size if part in str(arguments[0]) else 2**40)

    sys.addaudithook(heard)


def test_a_full_disk_is_one_line_and_nothing_half_written(tmp_path):
    """Wherever it is full: the run then goes on from the checkpoint before."""
    words = prepare(tmp_path, "classifier", steps=4, save_every=2, draw_every=3)
    assert run(tmp_path, [*words, "run=whole"])[0] == 0
    places = [
        ("config.yaml", 50, 0),
        ("metrics.jsonl", 250, 0),
        ("checkpoints/.partial-step_00000002/manifest", 100, 0),
        ("export/classifier/.model", 1000, 2),
        ("samples/.step_00000003", 99, 2),
        ("checkpoints/.partial-step_00000004/average", 1000, 2),
        ("checkpoints/.partial-step_00000004/optim-classifier", 0, 2),
    ]
    for number, (place, size, step) in enumerate(places):
        folder = tmp_path / f"r{number}"
        status, out, err = run(tmp_path, [*words, f"run={folder}"], partial(full, place, size))
        assert status == 1, (place, out, err)
        [line] = err.splitlines()
        assert line.startswith("maskgit: cannot write") and line.endswith("File too large")
        assert place.rpartition("/")[2].lstrip(".") in line, place
        assert leftovers(folder) == []
        assert (checkpoint.newest(folder / "checkpoints") or [0, {"step": 0}])[1]["step"] == step
        status, out, err = run(tmp_path, [*words, f"run={folder}"])
        assert status == 0 and ("resuming" in out) == (step > 0), err
        assert_same(tmp_path / "whole", folder)


def less_space_from(step):
    """Hook: the disk has room until a step comes to be saved."""
    shutil.disk_usage = lambda path: SimpleNamespace(free=2**40)

    def fill():
        shutil.disk_usage = lambda path: SimpleNamespace(free=12_000)

    fill() if step == 0 else at_step(step, fill, "save")


def test_free_space_is_looked_at_before_training_and_before_each_save(tmp_path):
    words = prepare(tmp_path, "classifier", steps=4, save_every=1)
    assert run(tmp_path, [*words, "run=whole"])[0] == 0
    for last, step in ((0, 0), (3, 2), (0, 2)):  # of a new run, of one on the way, of a resumed one
        status, _, err = run(tmp_path, [*words, "run=full"], partial(less_space_from, last))
        assert status == 1
        assert (
            err.startswith("maskgit: cannot write full: a checkpoint takes") and "are free" in err
        )
        assert len(err.splitlines()) == 1 and leftovers(tmp_path / "full") == []
        assert len(list((tmp_path / "full").glob("checkpoints/*"))) == min(step, 2)
    assert logged(tmp_path / "full")[-1]["step"] == 3
    status, out, _ = run(tmp_path, [*words, "run=full"])
    assert status == 0 and "resuming full at step 2" in out
    assert_same(tmp_path / "whole", tmp_path / "full")


# Damage.


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_byte_is_found_wherever_it_is_and_the_checkpoint_before_taken(tmp_path):
    words = prepare(tmp_path, steps=6, save_every=2)
    assert run(tmp_path, [*words, "run=whole"])[0] == 0
    assert run(tmp_path, [*words, "run=hurt", "train.steps=4"])[0] == 0
    folder = tmp_path / "hurt" / "checkpoints"
    last = folder / "step_00000004"
    draw = random.Random(0)
    for path in sorted(last.glob("*.safetensors")):
        for place in (0, 9, draw.randrange(path.stat().st_size), -1):
            bit = draw.randrange(8)
            flip(path, place, bit)
            _, manifest, [skipped] = checkpoint.newest(folder)
            assert manifest["step"] == 2
            assert "step_00000004" in skipped and path.name in skipped and "hash" in skipped
            flip(path, place, bit)
    manifest, path, found = checkpoint.read_manifest(last), last / checkpoint.MANIFEST, 0
    for place in range(path.stat().st_size):
        flip(path, place, place % 8)
        try:
            assert checkpoint.read_manifest(last) == manifest  # one white space for another
        except (ValueError, UserError):
            found += 1
            assert found % 50 or checkpoint.newest(folder)[1]["step"] == 2
        flip(path, place, place % 8)
    assert found > 500
    flip(last / "optim-generator.safetensors", 5000)
    status, out, _ = run(tmp_path, [*words, "run=hurt"])
    assert status == 0
    assert "checkpoint skipped: step_00000004: optim-generator.safetensors" in out
    assert "resuming hurt at step 2" in out
    assert_same(tmp_path / "whole", tmp_path / "hurt")
    assert checkpoint.read_manifest(last) == manifest  # made anew
