"""`maskgit tokenize`, stopped again and again: in the end there is what one go makes."""

import signal
import time
from functools import partial

import pytest
from runs import Started
from tiny_tokenizer import shards

from maskgit.commands.main import main
from maskgit.engine import tokenize


def never_done(begun):
    """Hook: says by a file when it begins, heeding signals by then; of 12 shards that it might
    write, none of the last two becomes whole."""

    def cleaned(*arguments):
        begun.touch()
        clean(*arguments)

    def written(path, content):
        while path.name in ("tokens-00010.safetensors", "tokens-00011.safetensors"):
            time.sleep(1)
        write(path, content)

    clean, write = tokenize._clean, tokenize._write
    tokenize._clean, tokenize._write = cleaned, written


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0)])
def test_whatever_stops_it_the_shards_become_those_of_a_run_in_one_go(processes, workers, tmp_path):
    common = "tokenize --data emoji:heldout --split train --tokenizer emoji --crops 1"
    common += f" --shard-images 16 --batch-size 8 --workers {workers} --out"
    assert main([*common.split(), str(tmp_path / "whole")]) == 0
    whole = shards(tmp_path / "whole" / "train")
    assert len(whole) == 12
    folder = tmp_path / "stopped" / "train"
    words = [*common.split(), tmp_path / "stopped"]
    there = {}
    for number, status, count in (
        (signal.SIGKILL, -signal.SIGKILL, 1),
        (signal.SIGTERM, 143, 4),
        (signal.SIGINT, 130, 6),
        (signal.SIGKILL, -signal.SIGKILL, 9),
        (None, 0, 12),
    ):
        begun = [tmp_path / f"{rank} of {processes}, to {count}" for rank in range(processes)]
        running = [
            Started(
                *(tmp_path, words, partial(never_done, file) if number else None),
                **{"RANK": str(rank), "WORLD_SIZE": str(processes)},
            )
            for rank, file in enumerate(begun)
        ]
        while number and not (all(b.exists() for b in begun) and len(shards(folder)) >= count):
            assert all(process.lives for process in running)
            time.sleep(0.01)
        for process in running if number else ():
            process.send(number, group=number == signal.SIGINT)  # Ctrl-C reaches the workers too
        statuses, _, errors = zip(*(process.wait(300) for process in running), strict=True)
        assert statuses == (status,) * processes, errors
        assert not any("Traceback" in error for error in errors)
        found = shards(folder)
        assert there.items() <= found.items() <= whole.items() and len(found) >= count
        assert (folder / "index.json").exists() == (number is None)
        there = found
    index = (folder / "index.json").read_bytes()
    assert index == (tmp_path / "whole" / "train" / "index.json").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", *whole]
