"""What the decoder did, as pictures: each step's image, with what was still masked in grey.

steps = []
decode(..., on_step=recorder(steps))
strip(steps, decode_tokens).save("trace.png")
"""

import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

GREY = 0.6
GAP = 2  # white pixels between the pictures
MILLISECONDS, AT_THE_END = 300, 2000  # a frame of the animation is shown


class Step(NamedTuple):
    """The arguments of `on_step`: the step, and (B, N) tokens, mask and confidence after it."""

    step: int
    tokens: Tensor
    mask: Tensor
    confidence: Tensor


def recorder(steps: list[Step]) -> Callable[..., None]:
    """An `on_step` for `decode` that adds each step to `steps`. It waits for no device."""
    return lambda *step: steps.append(Step(*step))


def frames(steps: Sequence[Step], decode_tokens: Callable[[Tensor], Tensor]) -> Tensor:
    """The images after each step, float (T, B, 3, H, W) in [0, 1], masked tokens in grey.

    decode_tokens: int64 (B, N) -> images (B, 3, H, W) in [0, 1], tokens in rows. Under the grey
    lie the tokens of the end, so that a tokenizer's overlap draws the settled ones as they will be.
    """
    return torch.stack([_frame(step, steps[-1].tokens, decode_tokens) for step in steps])


def _frame(step: Step, final: Tensor, decode_tokens: Callable[[Tensor], Tensor]) -> Tensor:
    images = decode_tokens(torch.where(step.mask, final, step.tokens)).float().cpu()
    height, width = images.shape[-2:]
    side = math.sqrt(height * width / final.shape[1])  # of a token, in pixels
    grid = round(height / side), round(width / side)
    mask = F.interpolate(step.mask.float().cpu().view(-1, 1, *grid), (height, width))
    return torch.where(mask > 0, GREY, images)


def strip(steps: Sequence[Step], decode_tokens: Callable[[Tensor], Tensor]) -> Image.Image:
    """One picture of the whole: a row for each image, a column for each step."""
    return _picture(frames(steps, decode_tokens).transpose(0, 1))


def save_gif(
    path: str | Path, steps: Sequence[Step], decode_tokens: Callable[[Tensor], Tensor]
) -> None:
    """Write the steps as an animation of the images side by side, which rests on the last one."""
    first, *rest = [_picture(frame[None]) for frame in frames(steps, decode_tokens)]
    durations = [MILLISECONDS] * len(rest) + [AT_THE_END]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    unfinished = Path(f"{path}.part")
    unfinished.write_bytes(buffer.getvalue())
    os.replace(unfinished, path)


def _picture(images: Tensor) -> Image.Image:
    """(rows, columns, 3, H, W) in [0, 1] -> one PIL image, with gaps between the cells."""
    cells = F.pad(images, (0, GAP, 0, GAP), value=1.0)  # (R, C, 3, h, w)
    sheet = cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (R h, C w, 3)
    pixels = (sheet[:-GAP, :-GAP] * 255).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.numpy())
