"""What the commands that make images have in common: options, and outputs checked beforehand."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.common import UserError
from maskgit.common.device import DTYPES
from maskgit.common.folder import file_hash, find, read_json

if TYPE_CHECKING:
    from maskgit.pipeline import Pipeline

SETTINGS = (
    "preset",
    "steps",
    "guidance",
    "guidance_schedule",
    "schedule",
    "order",
    "temperature",
    "choice_temperature",
    "top_k",
    "top_p",
)


def at_least(least: int) -> Any:
    """An argparse type: whole numbers from `least` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, and is {text}")
        return int(text)

    number.__name__ = "whole number"  # argparse says "invalid whole number value: ..."
    return number


def span(text: str) -> float | tuple[float, float]:
    """An argparse type: a number, or two with a comma between them."""
    numbers = [float(number) for number in text.split(",")]
    if len(numbers) > 2:
        raise ValueError
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


span.__name__ = "number or START,END"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model computes, on what."""
    parser.add_argument("--model", default="emoji", help="folder, bundled name or hub id (emoji)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16, fp16 or int8")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How it decodes; without these, as the model's own settings say."""
    group = parser.add_argument_group("decoding (by default as is best for the model)")
    group.add_argument("--preset", help="published settings in the model's folder, for the others")
    group.add_argument("--steps", type=at_least(1), help="parallel steps")
    group.add_argument("--guidance", type=float, help="classifier-free guidance; 0: off")
    group.add_argument("--guidance-schedule", help="constant, linear, power-cosine, interval")
    group.add_argument("--schedule", help="of the mask ratio: cosine, arccos, linear, ...")
    group.add_argument("--order", help="of settling: confidence, halton, halton-rolled")
    group.add_argument("--temperature", type=span, help="of the tokens' draw: T or START,END")
    group.add_argument("--choice-temperature", type=float, help="noise on the order; 0: none")
    group.add_argument("--top-k", type=at_least(0), help="draw from the k likeliest; 0: from all")
    group.add_argument("--top-p", type=float, help="draw from the likeliest that make up p; 0: all")


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampling_options`, as `Pipeline.sample` takes them."""
    return {name: getattr(args, name) for name in SETTINGS}


def load_pipeline(args: argparse.Namespace) -> "Pipeline":
    """The model of `add_model_options`."""
    from maskgit.pipeline import Pipeline

    return Pipeline.from_pretrained(args.model, args.device, args.dtype)


def model_hashes(source: str) -> dict[str, str]:
    """SHA-256 of the weights, by part."""
    parts = ("vqgan", "transformer")
    return {part: file_hash(find(source) / part / "model.safetensors") for part in parts}


def averaged(source: str) -> bool | None:
    """Whether a model has the moving average of its weights; None where it does not say."""
    return read_json(find(source) / "model_index.json").get("averaged_weights")


def computed_on(pipe: "Pipeline") -> dict[str, str]:
    """Device and dtype, by the names that the options have for them."""
    names = {name: short for short, name in DTYPES.items()}
    dtype = "int8" if pipe.int8 else names[str(pipe.dtype).removeprefix("torch.")]
    return {"device": str(pipe.device), "dtype": dtype}


def report(pipe: "Pipeline", count: int, what: str, seconds: float) -> None:
    """Print how long it took and how fast that was."""
    rate = f"{count / seconds:.3g} images/s"
    print(f"{count} {what} in {seconds:.1f} s: {rate} ({', '.join(computed_on(pipe).values())})")


def check_writable(path: Path) -> None:
    """Raise UserError unless a file could be written at `path`, its folders made where missing."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the file a name in it, such as {path / 'x.png'}")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: {folder} is no folder that lets one write into it")
