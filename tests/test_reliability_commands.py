"""Signals to other work than training: sampling, tokenizing, and what is before all work."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count

import pytest
from conftest import ROOT
from runs import at_call, leftovers, names, prepare, raise_at, run, sending
from tiny_tokenizer import shards

from vqgan import VQGAN

BOTH = TERM, INT = signal.SIGTERM, signal.SIGINT


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
    for _ in range(4):
        number, place = draw.choice(BOTH), 0.97 * (1 - draw.random() ** 2)
        hook = partial(at_call, int(place * int(total.read_text())), sending(number))
        status, _, err = run(tmp_path, [*command, "--out", tmp_path / "cut" / out], hook)
        assert status == 128 + number and "Traceback" not in err, err
        assert not (tmp_path / "cut").exists() or names(tmp_path / "cut") == []
    assert set(names(tmp_path)) - {*there, "calls", "whole", "cut"} == set()
    assert run(tmp_path, [*command, "--out", tmp_path / "cut" / out])[0] == 0


def raise_in_tokenizing(batch, number):
    """Hook: a signal while the tokenizer encodes its batch of this number."""
    encode, batches = VQGAN.encode, count()

    def wrapped(self, images):
        raise_at(batch, number, next(batches))
        return encode(self, images)

    VQGAN.encode = wrapped


def test_tokenizing_goes_on_with_the_next_shard(tmp_path):
    prepare(tmp_path, "maskgit")
    command = ["tokenize", "--data", tmp_path / "photos", "--tokenizer", tmp_path / "vq"]
    command += ["--size", "16", "16", "--shard-images", "3", "--no-mirror", "--out"]
    assert run(tmp_path, [*command, tmp_path / "whole"])[0] == 0
    whole, out = shards(tmp_path / "whole" / "train"), tmp_path / "cut"
    for batch, number, done in ((0, TERM, 0), (2, INT, 2), (3, TERM, 5)):
        hook = partial(raise_in_tokenizing, batch, number)
        status, _, err = run(tmp_path, [*command, out], hook)
        assert status == 128 + number and "Traceback" not in err, err
        assert leftovers(out) == [] and len(shards(out / "train")) == done
    assert run(tmp_path, [*command, out])[0] == 0
    assert shards(out / "train") == whole


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
