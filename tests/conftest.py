"""What several test files share: running the command, and an installation outside the tree."""

import os
import signal
import site
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one thread a worker
# Told to write no bytecode, Python compiles torch at each start, which doubles what that takes.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

sys.dont_write_bytecode = False

# Where Ctrl-C is ignored, as in what a shell starts in the background, what this starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SHARD = ROOT / "maskgit" / "assets" / "emoji" / "data" / "emoji-heldout.tar"


def first_loss(task, *batches, step=0):
    """Part, loss, weight and logs of the first update of a step, on one micro-batch or more."""
    part, (compute, *_) = next(task.step(list(batches), step))
    return part, *compute()


def execute(*command, cwd, **environment):
    """Run a command with no input; a CompletedProcess with its output as text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def pictures(count):
    """File names and contents of `count` PNGs of the bundled held-out drawings."""
    with tarfile.open(SHARD) as shard:
        members = [member for member in shard if member.name.endswith(".png")][:count]
        return [(member.name, shard.extractfile(member).read()) for member in members]


def one_line(error, *parts):
    """Assert that an error that pytest caught says all these parts, in one line."""
    message = str(error.value)
    assert "\n" not in message
    assert all(str(part) in message for part in parts), message


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """Features of earlier runs, and the home of whoever runs the tests, play no part."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def maskgit(tmp_path):
    """`maskgit(*arguments)` runs the command of this checkout in `tmp_path`."""

    def run(*arguments, cwd=tmp_path):
        command = (sys.executable, "-m", "maskgit", *arguments)
        return execute(*command, cwd=cwd, PYTHONPATH=str(ROOT))

    return run


@pytest.fixture
def forked(tmp_path):
    """The same in a process that is forked from one that has loaded torch: 5 seconds less."""
    from runs import Started

    def run(*arguments, cwd=tmp_path):
        status, out, err = Started(cwd, arguments).wait(1800)
        return subprocess.CompletedProcess(arguments, status, out, err)

    return run


@pytest.fixture
def threads():
    """`threads(n)` sets how many threads PyTorch has, until the test ends."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def new_environment(tmp_path_factory):
    """`new_environment()` makes a virtual environment and returns its folder of programs.

    It sees the packages installed beside these tests, which are too large to install again, but
    not this checkout.
    """

    def make():
        folder = tmp_path_factory.mktemp("environment")
        done = execute(sys.executable, "-m", "venv", folder, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        # Of the folders that a path file names, the path files have no effect: among them is the
        # one that an editable install of this checkout may have left.
        Path(paths["purelib"], "heavy.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        return Path(paths["scripts"])

    return make


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with random weights, in a folder."""
    from tiny_clip import save_clip

    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A tiny tokenizer with random weights, in a folder."""
    from tiny_tokenizer import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
