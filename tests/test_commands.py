"""The command as a user meets it: help, mistakes, signals, doctor."""

import argparse
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, execute, pictures

from maskgit.commands import main as entry
from maskgit.commands.main import COMMANDS, Parser, _module, main
from maskgit.common import UserError


def load(name):
    """The module of a command, of "evaluate images" as of "sample"."""
    return import_module(_module("maskgit.commands", name.replace(" ", ".")))


EVALUATE = [f"evaluate {name}" for name in load("evaluate").COMMANDS]
RUNNING = [name for name in COMMANDS if name != "evaluate"] + EVALUATE
# Each of its own is; files that one has to fetch; these are not fetched here.
NOT_RUN = ("evaluate", "import", "download")
AFTER = {"plot": "train"}  # whose example takes what the other's makes


def test_every_command_is_listed_and_no_other():
    folder = Path(entry.__file__).parent
    files = {file.relative_to(folder).with_suffix("") for file in folder.rglob("*.py")}
    names = {" ".join(file.parts) for file in files if file.stem not in ("__init__", "main")}
    found = {name.rstrip("_").replace("_", "-") for name in names if hasattr(load(name), "run")}
    assert found == set(RUNNING)


def test_help_of_all_lists_each_command(maskgit):
    done = maskgit("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("example: maskgit sample")
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("name", [*RUNNING, "evaluate"])
def test_help_of_each_command_starts_with_an_example(maskgit, name):
    done = maskgit(*name.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"example: maskgit {name}")
    assert f"usage: maskgit {name}" in done.stdout


@pytest.mark.parametrize("name", RUNNING)
def test_the_example_parses(name):
    command = load(name)
    assert f"{command.EXAMPLE} ".startswith(f"maskgit {name} ")
    rest = command.EXAMPLE.removeprefix(f"maskgit {name}").split()
    parser = Parser(f"maskgit {name}", command.EXAMPLE, command.HELP)
    command.add_arguments(parser)
    parser.check_options(rest)
    parser.parse_intermixed_args(rest)


COMPARED = ["evaluate generator", "evaluate images", "evaluate compare"]  # the last the others
ALONE = [name for name in RUNNING if name not in (*NOT_RUN, *AFTER.values(), *COMPARED)]
# Less than the examples': steps of training, mirror images, steps of an image that is scored.
SHORT = {
    "train": ["train.steps=50"],
    "tokenize": ["--no-mirror"],
    "evaluate generator": ["--steps", "2"],
    "evaluate sweep": ["--steps", "1,2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("names", [*([name] for name in ALONE), COMPARED], ids=" ".join)
def test_the_examples_run(names, forked, tmp_path):
    [(_, photo)] = pictures(1)
    (tmp_path / "photo.png").write_bytes(photo)
    for name in [AFTER[name] for name in names if name in AFTER] + names:
        done = forked(*load(name).EXAMPLE.split()[1:], *SHORT.get(name, []))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert "\r" not in done.stdout + done.stderr


def test_sample_py_is_maskgit_sample(maskgit, tmp_path):
    script = execute(sys.executable, ROOT / "sample.py", "--help", cwd=tmp_path)
    assert (script.returncode, script.stdout) == (0, maskgit("sample", "--help").stdout)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "which command?"),
        (["smaple"], "did you mean 'sample'"),
        (["--hlep"], "did you mean '--help'"),
        (["doctor", "--hlep"], "did you mean '--help'"),
        (["doctor", "now"], "unrecognized arguments: now"),
        (["sample", "--clas", "cat-face"], "did you mean '--class'"),
        (["sample", "--num", "many"], "--num"),
    ],
)
def test_mistakes_are_told_in_one_line(maskgit, arguments, hint):
    done = maskgit(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("maskgit: ")
    assert done.stderr.count("\n") == 1
    assert hint in done.stderr


def a_parser():
    parser = Parser("maskgit try", "maskgit try photo.png", "")
    parser.add_argument("image")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-n", "--num", type=int, default=1)
    parser.add_argument("--smoke", action="store_true")
    return parser


def test_options_may_stand_between_positionals():
    arguments = ["--num", "3", "a.png", "--smoke", "steps=-2", "lr=0.1", "-n", "-4"]
    parser = a_parser()
    parser.check_options(arguments)
    args = parser.parse_intermixed_args(arguments)
    assert (args.image, args.overrides) == ("a.png", ["steps=-2", "lr=0.1"])
    assert (args.num, args.smoke) == (-4, True)


@pytest.mark.parametrize("option", ["--nmu", "--nmu=3", "--smok", "-q"])
def test_unknown_options_are_found_wherever_they_stand(option):
    for arguments in ([option, "1", "a.png"], ["a.png", option], ["a.png", "--num", "1", option]):
        with pytest.raises(UserError, match=f"no option {option.partition('=')[0]}:"):
            a_parser().check_options(arguments)
    a_parser().check_options(["--", option])


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)` is the exit status of a command that raises `error`."""

    def run(error):
        def raise_it(arguments):
            raise error

        monkeypatch.setattr(entry, "dispatch", raise_it)
        before = signal.getsignal(signal.SIGTERM)
        try:
            return main([])
        finally:
            signal.signal(signal.SIGTERM, before)

    return run


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such\nthing"), 2, "maskgit: no such thing\n"),
        (KeyboardInterrupt(), 130, "maskgit: interrupted\n"),
        (PermissionError(13, "Permission denied", "x.png"), 2, "x.png: Permission denied"),
    ],
)
def test_errors_become_exit_statuses(failing, capsys, error, status, line):
    assert failing(error) == status
    shown = capsys.readouterr()
    assert line in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_bug_keeps_its_traceback(failing):
    for error in (ValueError("bug"), FileNotFoundError(2, "No such file", "lost.png")):
        with pytest.raises(type(error)):
            failing(error)


STOPPED = """
import sys, time
from maskgit.commands import main as entry
def wait(arguments):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
entry.dispatch = wait
sys.exit(entry.main([]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_clean_up_and_set_the_status(number, status):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, b"cleaned up\n")
    assert b"Traceback" not in err


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "maskgit", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_is_told_in_one_line():
    command = [sys.executable, "-m", "maskgit", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    line = b"maskgit: cannot write the output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_doctor_tells_what_is_here(forked):
    import torch

    done = forked("doctor")
    assert done.returncode == 0, done.stdout
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert torch.__version__ in found["torch and torchvision"]
    assert ("AVX2" in found["processor"]) == torch.cpu._is_avx2_supported()
    assert found["auto"].startswith("device c")
    for part in ("vqgan", "transformer"):
        assert len(found[f"weights emoji/{part}"].split("sha256 ")[1]) == 64
    assert "loss.perceptual" in found["weights vgg16"]
    assert "FID" in found["weights inception"] and "sha256" in found["weights emoji/classifier"]
    assert "GB free" in found["disk"]


def test_doctor_reports_missing_weights(monkeypatch, tmp_path, capsys):
    from maskgit.commands import doctor

    monkeypatch.setattr(doctor, "BUNDLED", {"emoji": tmp_path})
    assert doctor.run(argparse.Namespace(model=None)) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert len(problems) == len(doctor.PARTS) == 4
    assert all("missing" in line and str(tmp_path) in line for line in problems)
