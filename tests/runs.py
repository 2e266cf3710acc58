"""Tiny runs of `maskgit train`, each in a process of its own: what the reliability tests start.

The processes are forked from one that has loaded torch, so that each takes a fraction of a second.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import yaml
from pictures import make_folder
from tiny_tokenizer import save_tokenizer

from maskgit.engine import checkpoint

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["maskgit.joins", "maskgit.commands.sample", "pytest"])

QUIET = dict(
    device="cpu",
    dtype="fp32",
    batch_size=4,
    warmup=2,
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
    """A process that runs `maskgit` with these words, and what it says."""

    def __init__(self, folder, words, hook=None, **environment):
        """hook: called in the process before the command, with functions to put in its way."""
        self.told = [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        arguments = (list(map(str, words)), folder, self.told, environment, hook)
        self.process = PROCESSES.Process(target=_work, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def send(self, number, group=False):
        """A signal to the process; with `group` to its data workers too, as Ctrl-C is."""
        (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds=120):
        """Exit status (below 0: the signal that killed it), stdout and stderr. The time is no
        bound on what it may take, but on hanging."""
        self.process.join(seconds)
        hung = self.process.exitcode is None
        if hung:
            self.send(signal.SIGKILL, group=True)
            self.process.join()
        out, err = (path.read_text() if path.exists() else "" for path in self.told)
        assert not hung, f"it hangs: {out}{err}"
        return self.process.exitcode, out, err


def _work(words, folder, told, environment, hook):
    sys.dont_write_bytecode = True  # of what a limit on files cuts short, others would read half
    os.setpgid(0, 0)
    for number, path in enumerate(told, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    os.chdir(folder)
    from maskgit.commands.main import main

    if hook:
        hook()
    sys.exit(main(words))


def run(folder, words, hook=None, **environment):
    """What `Started(...).wait()` gives."""
    return Started(folder, words, hook, **environment).wait()


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


def folders(path: Path):
    return sorted(p.name for p in path.iterdir())
