"""What a run notes as it goes: numbers and pictures, for people and for their trackers."""

import errno
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from maskgit.common import UserError, pick
from maskgit.common.folder import naming, write_whole

if TYPE_CHECKING:
    from torch import Tensor

PROJECT = "maskgit"  # what a run belongs to, at trackers that have projects
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Journal:
    """`metrics.jsonl`, pictures in `samples/`, and the same for trackers; of the main process."""

    def __init__(
        self, run: Path, start: int, trackers: Sequence[str], config: dict[str, Any]
    ) -> None:
        """Go on at step `start`: what a killed run noted beyond its last checkpoint is dropped.

        trackers: names of accelerate's. config: settings to show there, may be nested.
        Raises UserError for a tracker that is unknown, not installed or does not start. A disk that
        is full, then or later, is an OSError that names the file.
        """
        check_trackers(trackers)
        self.run = run
        self.samples = run / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)
        for unfinished in self.samples.glob(".step_*"):
            unfinished.unlink()
        self.file = run / "metrics.jsonl"
        if self.file.exists():
            kept = [end for end, values in entries(self.file) if values["step"] <= start]
            os.truncate(self.file, max(kept, default=0))
        self.trackers = []
        settings = _flat(config)
        with ExitStack() as stack:
            stack.callback(setattr, threading, "excepthook", threading.excepthook)
            threading.excepthook = _quiet_thread
            for name in dict.fromkeys(trackers):
                tracker = _start(name, run, start)
                stack.enter_context(naming(run / name))
                stack.callback(tracker.finish)
                _describe(tracker, start, settings)
                self.trackers.append(tracker)
            self.close = stack.pop_all().close

    def write(self, step: int, values: dict[str, float]) -> None:
        """Note `values` of a step."""
        with naming(self.file), self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        named = {re.sub(r"[^\w./-]", "_", name): value for name, value in values.items()}
        for tracker in self.trackers:
            with naming(self.run / tracker.name):
                tracker.log(named, step)

    def picture(self, step: int, image: "Tensor") -> None:
        """`image` (3, H, W) in [0, 1]: whole under its name, or not there."""
        levels = (image.detach().cpu() * 255).round().clamp(0, 255).byte()
        pixels = levels.permute(1, 2, 0).numpy()  # (H, W, 3)
        png = BytesIO()
        Image.fromarray(pixels).save(png, "png")
        file = self.samples / f"step_{step:08d}.png"
        write_whole(file, png.getvalue())
        for tracker in self.trackers:
            with naming(self.run / tracker.name):
                _show(tracker, step, pixels)


def entries(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a metrics.jsonl: the byte at which each ends, and its values.

    It ends before the first line that is torn, as a kill or a full disk may leave the last one.
    """
    end = 0
    with file.open("rb") as lines:
        for line in lines:
            end += len(line)
            try:
                values = json.loads(line)
            except ValueError:
                return
            whole = line.endswith(b"\n") and isinstance(values, dict)
            if not whole or not isinstance(values.get("step"), int):
                return
            yield end, values


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError unless accelerate knows all these trackers, and their packages are here."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        pick(LOGGER_TYPE_TO_CLASS, name, "tracker in train.trackers")
        if name not in installed:
            raise UserError(
                f"train.trackers: {name} is not installed (installed: "
                f"{', '.join(installed) or 'none'}): pip install {name}, or leave it out"
            )


def _start(name: str, run: Path, start: int) -> Any:
    """accelerate's tracker of that name, ready to take values from step `start` on."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    title = run.resolve().name
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "tensorboard": (("tensorboard", run), {"purge_step": start + 1}),
        "aim": ((title, run), {}),
        "dvclive": ((title,), {"dir": str(run / "dvclive"), "resume": start > 0}),
        "mlflow": ((PROJECT,), {"run_name": title}),
        "swanlab": ((PROJECT,), {"experiment_name": title, "logdir": str(run / "swanlab")}),
        "trackio": ((PROJECT,), {"name": title}),
        "wandb": ((PROJECT,), {"name": title, "dir": str(run)}),
    }
    positional, named = arguments.get(name, ((PROJECT,), {}))
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](*positional, **named)
        tracker.start()
    except Exception as error:  # each tracker has its own: no account, no server, no network
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"train.trackers: {name} does not start ({why}): set it up, or leave it out"
        ) from None
    return tracker


def _describe(tracker: Any, start: int, settings: dict[str, Any]) -> None:
    """Show a run's settings there."""
    if tracker.name == "tensorboard":  # its table of them would be one more folder at each start
        tracker.log({"config": "\n".join(f"    {k}: {v}" for k, v in settings.items())}, start)
    else:
        tracker.store_init_configuration(settings)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, each value a number, a truth value or a text."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float) else str(value)
    return flat


def _show(tracker: Any, step: int, pixels: Any) -> None:
    """A picture, uint8 (H, W, 3), where accelerate has pictures: each wants another form of it."""
    if tracker.name == "tensorboard":
        tracker.log_images({"samples": pixels[None]}, step, dataformats="NHWC")
    elif tracker.name in ("wandb", "swanlab"):
        tracker.log_images({"samples": [pixels]}, step)
    elif tracker.name in ("aim", "clearml"):
        tracker.log_images({"samples": pixels}, step)


def _quiet_thread(arguments: Any) -> None:
    """What fails in TensorBoard's thread fails in the main one too, and is told there."""
    if type(arguments.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(arguments)
