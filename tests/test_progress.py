"""Progress: plain lines where there is no terminal, a bar where there is one."""

import os
import pty
import subprocess
import sys

from conftest import ROOT

from maskgit.common import progress as module
from maskgit.common.progress import clock, meter, progress


def test_items_pass_through_and_the_last_line_tells_the_count(capsys):
    assert list(progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("letters 3/3")
    assert "steps/s  0:00 left" in lines[0]


def test_lines_come_at_intervals_with_the_note(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with meter(10, "training", unit="images", done=4) as advance:
        advance(3, note="loss 1.5")
        advance(3)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("training 7/10")
    assert first.endswith("loss 1.5")
    assert "images/s" in first
    assert last.startswith("training 10/10")


def test_an_unknown_total_has_no_time_left(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(progress(iter("ab"), "letters")) == ["a", "b"]
    err = capsys.readouterr().err
    assert "letters 2 " in err
    assert "left" not in err


def test_a_terminal_gets_a_bar_and_stdout_stays_clean():
    code = (
        "from maskgit.common.progress import progress\nfor i in progress(range(3), 'go'): print(i)"
    )
    terminal, end = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=end
    )
    os.close(end)
    shown = b""
    try:
        while piece := os.read(terminal, 65536):
            shown += piece
    except OSError:  # what Linux says at the end of a terminal
        pass
    os.close(terminal)
    assert (done.returncode, done.stdout) == (0, b"0\n1\n2\n")
    assert b"\x1b[" in shown
    assert b"3/3" in shown


def test_clock():
    assert [clock(s) for s in (-1, 0.6, 75, 3599.6, 7325)] == [
        "0:00",
        "0:01",
        "1:15",
        "1:00:00",
        "2:02:05",
    ]
