"""Pictures to look at: labelled sheets, and files that are written whole or not at all."""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

Group = tuple[str, Sequence[Image.Image]]  # a label and the pictures under it

SMALLEST, LARGEST = 64, 512  # sides of a picture on a sheet, in pixels
NARROWEST = 128  # width of a group, so that its label can be read
COLUMNS = 8  # pictures beside each other in a group
GAP, MARGIN = 4, 16
LABEL, TITLE = 12, 15  # font sizes
LINE = 18  # from the top of a label to its pictures
INK, PAPER = "#222222", "white"


def to_pictures(images: "Tensor") -> list[Image.Image]:
    """PIL pictures of images (B, 3, H, W) in [0, 1]: round(255 x)."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def sheet(groups: Iterable[Group], title: str = "") -> Image.Image:
    """One picture of many: the groups side by side, each label above its pictures.

    Small pictures are enlarged by a whole number, large ones shrunk; a label that is too long for
    its group is cut.
    """
    groups = [(label, [p.convert("RGB") for p in pictures]) for label, pictures in groups]
    most = max(len(pictures) for _, pictures in groups)
    columns = min(most, COLUMNS)
    size = _tile(max((p.size for _, pictures in groups for p in pictures), key=max), columns)
    rows = -(-most // columns)
    width = columns * (size[0] + GAP) - GAP + MARGIN
    height = LINE + rows * (size[1] + GAP) - GAP + MARGIN
    across = round(math.sqrt(1.5 * len(groups) * height / width))  # about three wide, two high
    across = min(max(across, 1), len(groups))
    down = -(-len(groups) // across)

    head = TITLE + MARGIN if title else 0
    paper = Image.new("RGB", (across * width + MARGIN, head + down * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(paper)
    if title:
        _write(draw, (MARGIN, MARGIN // 2), title, TITLE, paper.width - 2 * MARGIN)
    for i, (label, pictures) in enumerate(groups):
        x, y = MARGIN + i % across * width, head + MARGIN // 2 + i // across * height
        _write(draw, (x, y), label, LABEL, width - MARGIN)
        for j, picture in enumerate(pictures):
            row, column = divmod(j, columns)
            corner = (x + column * (size[0] + GAP), y + LINE + row * (size[1] + GAP))
            paper.paste(_fit(picture, size), corner)
    return paper


def _tile(largest: tuple[int, int], columns: int) -> tuple[int, int]:
    """Width and height that the pictures get, the largest of which is `largest`."""
    least = max(SMALLEST, (NARROWEST - (columns - 1) * GAP) / columns)
    scale = min(max(1, math.ceil(least / max(largest))), LARGEST / max(largest))
    return max(1, round(scale * largest[0])), max(1, round(scale * largest[1]))


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.width > size[0] or picture.height > size[1]:
        picture = picture.copy()
        picture.thumbnail(size)
        return picture
    scale = min(size[0] // picture.width, size[1] // picture.height)
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, width: int
) -> None:
    font = ImageFont.load_default(size)
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    draw.text(corner, text, INK, font)


def save_all(pictures: Mapping[Path, Image.Image | bytes]) -> None:
    """Write PNG files (or bytes as they are): all of them whole, then all of them in their places.

    Whatever interrupts it leaves no half-written file. Makes the folders that are missing.
    """
    for folder in {path.parent for path in pictures}:
        folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(pictures))
    with tempfile.TemporaryDirectory(prefix=".maskgit-", dir=first.parent) as scratch:
        ready = []
        for i, (path, picture) in enumerate(pictures.items()):
            ready.append((Path(scratch, str(i)), path))
            if isinstance(picture, bytes):
                ready[-1][0].write_bytes(picture)
            else:
                picture.save(ready[-1][0], "PNG")
        for written, path in ready:
            written.replace(path)
