"""Processes of `maskgit`, and tiny runs of `maskgit train` for them: what the reliability tests and
others start.

The processes are forked from one that has loaded torch, so that each takes a fraction of a second.
"""

import atexit
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from functools import partial
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path

import torch
import yaml
from pictures import make_folder
from tiny_tokenizer import save_tokenizer

from maskgit.common.folder import LOCK
from maskgit.engine import checkpoint

PRELOADED = ["maskgit.joins", "PIL.PngImagePlugin", "einops._torch_specific", "pytest"]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(PRELOADED)

OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}  # that change files
QUIET = dict(
    device="cpu",
    dtype="fp32",
    batch_size=4,
    warmup=2,
    final_lr=1.0,  # so that no step depends on how many there will be
    log_every=1,
    validate_every=0,
    draw_every=0,
    save_every=0,
    trackers=[],
)
# Of each task the settings of a model that learns from 16 x 16 pixels in a blink.
GAN = dict(gradient=1.0, adversarial=0.1, discriminator_from=3, generator_from=4, ramp=2)
GAN |= dict(feature_matching=1.0, entropy=0.1, quantize_from=2, dead=1.0, r1=0.1, r1_every=2)
CONFIGS = {
    "vqgan": {
        "model": dict(channels=8, mult=[1, 1, 2], encoder_blocks=1, decoder_blocks=1, z_channels=8)
        | dict(groups=4, shortcut="input", quantizer=dict(codebook_size=16, dim=8)),
        "discriminator": dict(channels=8, layers=1),
        "loss": GAN,
    },
    "maskgit": {"size": "tiny", "model": dict(width=32), "loss": {}},
    "classifier": {"model": dict(widths=[8, 16], groups=4), "loss": {}},
    "clip": {
        "model": dict(
            embed=24,
            image=dict(size=[16, 16], patch=8, width=32, depth=1, heads=2),
            text=dict(merges=300, context=24, width=32, depth=1, heads=2),
        ),
        "loss": dict(positives="caption"),
    },
}


def prepare(folder, task="vqgan", **train):
    """Write a run's config and 22 small pictures with captions into `folder`; gives the words of
    the command that trains on them."""
    if not (folder / "photos").exists():
        make_folder(folder / "photos", ["left", "right"], 11)
        for picture in (folder / "photos").rglob("*.png"):
            picture.with_suffix(".txt").write_text(f"picture {picture.stem}\nof {picture.parent}")
    content = {"task": task, **CONFIGS[task], "train": {**QUIET, **train}}
    content["data"] = {"path": str(folder / "photos"), "size": [16, 16]}
    if task == "maskgit":
        if not (folder / "vq").exists():
            save_tokenizer(folder / "vq")
        content["tokenizer"] = str(folder / "vq")
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(content))
    return ["train", str(folder / f"{task}.yaml")]


class Started:
    """A process that runs `maskgit` with these words in a folder, and what it says."""

    def __init__(self, folder, words, hook=None, **environment):
        """hook: called in the process before the command, to put functions in its way; what it
        gives, if anything, after it."""
        ends = [PROCESSES.Pipe(duplex=False) for _ in range(2)]  # no files: they have no limits
        writers = [writer for _, writer in ends]
        arguments = (list(map(str, words)), folder, writers, environment, hook)
        self.process = PROCESSES.Process(target=_work, args=arguments)
        self.process.start()
        self.pid = self.process.pid
        self.readers = [reader for reader, _ in ends]
        self.texts = ["", ""]
        for writer in writers:
            writer.close()
        atexit.register(self.end)  # or a failed test would leave it

    def end(self):
        if self.lives:
            self.send(signal.SIGKILL, group=True)

    def send(self, number, group=False):
        """A signal to the process; with `group` to its data workers too, as Ctrl-C is."""
        (os.killpg if group else os.kill)(self.pid, number)

    @property
    def lives(self):
        return self.process.exitcode is None

    def said(self):
        """Its stdout and stderr so far."""
        for i, reader in enumerate(self.readers):
            while reader in wait([reader], 0) and (more := os.read(reader.fileno(), 2**16)):
                self.texts[i] += more.decode()
        return tuple(self.texts)

    def wait(self, seconds=120):
        """Exit status (below 0: the signal that killed it), stdout and stderr. The time is no
        bound on what it may take, but on hanging."""
        end = time.monotonic() + seconds
        while self.lives and time.monotonic() < end:
            self.process.join(0.5)
            self.said()  # or it waits to be heard
        hung = self.lives
        self.end()
        self.process.join()
        assert not hung, f"it hangs: {self.said()}"
        return self.process.exitcode, *self.said()


def _work(words, folder, writers, environment, hook):
    sys.dont_write_bytecode = True  # of what a limit on files cuts short, others would read half
    os.setpgid(0, 0)
    for number, writer in enumerate(writers, 1):
        os.dup2(writer.fileno(), number)
        writer.close()
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as by default
    sys.stdout.reconfigure(line_buffering=True)  # what a killed process has said counts
    os.environ.update(environment)
    os.chdir(folder)
    from maskgit.commands.main import main

    after = hook() if hook else None
    status = main(words)
    if after:
        after()
    sys.exit(status)


def run(folder, words, hook=None, **environment):
    """What `Started(...).wait()` gives."""
    return Started(folder, words, hook, **environment).wait()


def pair(work, *arguments):
    """Call `work(rank, *arguments)` in two processes at once, both of which have to end well."""
    both = [PROCESSES.Process(target=work, args=(r, *arguments), daemon=True) for r in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(600)
    assert [process.exitcode for process in both] == [0, 0]


def several(folder, words, count=2, hooks=None):
    """The processes of one run, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launched = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        Started(folder, words, (hooks or {}).get(r), RANK=str(r), LOCAL_RANK=str(r), **launched)
        for r in range(count)
    ]


def at_step(number, do, name="update"):
    """Hook: call `do` as the engine comes to step `number`; before its update, or its save."""
    from maskgit.engine.state import State

    before = getattr(State, name)

    def wrapped(self, *arguments, **named):
        step = arguments[1]
        if step == number:
            do()
        return before(self, *arguments, **named)

    setattr(State, name, wrapped)


def at_call(number, do, total=None, met=False):
    """Hook: call `do` when the process has called `number` functions of Python or C: at any moment,
    the same one each time. How many it calls in all goes into the file `total`.

    met: count from when the processes of the run have found each other.
    """
    own, count = os.getpid(), 0

    def profile(frame, event, argument):
        nonlocal count
        if event in ("call", "c_call") and os.getpid() == own:
            count += 1
            if count == number:
                do()

    if met:
        from maskgit import joins

        meet = joins.make_accelerator
        joins.make_accelerator = lambda *a: (meet(*a), sys.setprofile(profile))[0]
    else:
        sys.setprofile(profile)
    return lambda: total and total.write_text(f"{count}")


def while_saving(step, operation):
    """Hook: call `operation` with their number before each of the changes to files that a run makes
    while it saves at `step`."""
    from maskgit.engine.state import State

    save, numbers, active = State.save, count(), False

    def watched(self, run, done, *arguments):
        nonlocal active
        active = done == step
        save(self, run, done, *arguments)
        active = False

    def heard(event, arguments):
        nonlocal active
        if active and event in OPERATIONS and (event != "open" or writes(arguments)):
            active = False  # what `operation` does is no change
            operation(next(numbers))
            active = True

    State.save = watched
    sys.addaudithook(heard)


def writes(opening):
    """Whether an audited `open` (path, mode, flags) makes a file."""
    return isinstance(opening[0], str | Path) and bool(opening[2] & os.O_CREAT)


def sending(number):
    """What sends a signal to the process that calls it."""
    return partial(signal.raise_signal, number)


def raise_at(last, number, count):
    """Send a signal if it is the `last` of what is counted."""
    if count == last:
        signal.raise_signal(number)


def newest(run):
    """All tensors of a run's newest complete checkpoint, and its step."""
    state, manifest, _ = checkpoint.newest(run / "checkpoints")
    return manifest["step"], {f"{f}/{k}": v for f, part in state.items() for k, v in part.items()}


def assert_same(run, other):
    """That two runs have come to the same end, bit by bit."""
    (step, tensors), (other_step, others) = newest(run), newest(other)
    assert step == other_step and tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


def logged(run):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def until(condition, seconds=60):
    """Wait for it; the time is a bound on hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.005)


def names(folder: Path):
    return sorted(path.name for path in folder.iterdir())


def leftovers(run):
    """What is hidden in a run's folder, but for its lock: all of it half-written."""
    hidden = (path for path in run.rglob(".*") if path != run / LOCK)
    return sorted(str(path.relative_to(run)) for path in hidden)
