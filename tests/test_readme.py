"""Every command and every Python block of the README, and of the page on one's own data, runs, in
order, in a copy of the tree.

Beside the tree the blocks find what they may name: `photo.png`; `photos`, a folder of classes; and
`pairs`, a flat folder of images with captions.
Five things differ from what is written: training is given `--smoke` and 30 steps, a generator that
is evaluated 2 steps an image, `git clone` and `cd` are left out since the copy is the clone, `make`
uses the environment of these tests instead of installing one, and `make test` is only asked what it
would do, since this is it.
"""

import csv
import os
import re
import shutil
import sys

import pytest
from conftest import ROOT, execute, pictures

DOCUMENTS = ("README.md", "docs/your_own_data.md")
COMMAND = re.compile(r"^(\$ )?(maskgit|make|pip|python|git) ", re.MULTILINE)

SHORT = "train.steps=30 train.log_every=10 train.validate_every=30 train.draw_every=30"


def blocks(document):
    """(language, text) of each fenced block."""
    text = (ROOT / document).read_text()
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def adapted(script):
    """The script with the differences that the head of this file tells."""
    script = re.sub(r"^(git clone|cd) .*\n", "", script, flags=re.MULTILINE)
    script = re.sub(r"\bmaskgit train (\w+)", rf"maskgit train --smoke \1 {SHORT}", script)
    script = re.sub(r"\bmaskgit evaluate generator\b", r"\g<0> --steps 2", script)
    script = re.sub(r"\bmake (?=test)", "make -n ", script)
    return re.sub(r"\bmake (?=\w|-n)", "make -o .venv/.ready ", script)


@pytest.fixture
def copy(tmp_path):
    """A copy of the tree, with pictures of the bundled set as someone's own."""
    ignore = shutil.ignore_patterns(".*", "__pycache__", "runs", "out")
    tree = shutil.copytree(ROOT, tmp_path / "maskgit", ignore=ignore)
    (tree / ".venv").symlink_to(sys.prefix)
    for i, (name, content) in enumerate(pictures(60)):
        file = tree / "photos" / "ab"[i % 2] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        (tree / "photo.png").write_bytes(content)
        pair = tree / "pairs" / name
        pair.parent.mkdir(exist_ok=True)
        pair.write_bytes(content)
        pair.with_suffix(".txt").write_text(f"drawing {i}")
    return tree


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_marked_as_such(document):
    unmarked = [text for language, text in blocks(document) if language not in ("bash", "python")]
    assert [text for text in unmarked if COMMAND.search(text)] == []


def test_adapted():
    assert adapted("git clone X\ncd maskgit\nmake sample\n") == "make -o .venv/.ready sample\n"
    assert adapted("make test-slow\n") == "make -o .venv/.ready -n test-slow\n"
    assert adapted("maskgit train x a=1\n") == f"maskgit train --smoke x {SHORT} a=1\n"
    assert adapted("maskgit evaluate generator --num 9\n").endswith("--steps 2 --num 9\n")


def test_the_table_is_that_of_the_sweep():
    rows, rates = (
        list(csv.DictReader((ROOT / "docs" / f"{n}.csv").open())) for n in ("sweep", "rates")
    )
    rate = {(row["steps"], row["guidance"]): float(row["images/s"]) for row in rates}
    measured = ("FD-emoji", "precision-emoji", "recall-emoji", "accuracy-emoji")
    for row in rows:
        numbers = " | ".join(f"{float(row[name]):.2f}" for name in measured)
        settings = f"{row['steps']} | {row['schedule']} | {float(row['guidance']):g}"
        speed = rate[row["steps"], row["guidance"]]
        line = f"| {settings} | {numbers} | {speed:.1f} |\n"
        assert line in (ROOT / "README.md").read_text()
    assert len(rows) == 24


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_runs(document, copy, new_environment):
    programs = new_environment()
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say that isolation is off
    }
    install = (
        programs / "python",
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
        ".",
    )
    done = execute(*install, cwd=copy, **environment)
    assert done.returncode == 0, done.stdout + done.stderr

    programs_of = {
        "bash": ("bash", "-euo", "pipefail", "-c"),
        "python": (programs / "python", "-c"),
    }
    run = 0
    for language, text in blocks(document):
        if language in programs_of:
            script = adapted(text) if language == "bash" else text
            done = execute(*programs_of[language], script, cwd=copy, **environment)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            run += 1
    assert run >= 2
