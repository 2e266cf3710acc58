"""Pictures of an evaluation: its images, and each beside the nearest of the reference."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from maskgit.evaluation.score import Scorer
from maskgit.evaluation.sets import PixelSet
from maskgit.sheet import save_all, sheet

SHOWN = 64


def save(out: Path, images: PixelSet, scorer: Scorer) -> None:
    """Write grid.png, and nearest.png where the reference has images."""
    first = pictures(images, list(range(min(SHOWN, len(images)))))
    files: dict[Path, Image.Image | bytes] = {out / "grid.png": sheet([("", first)])}
    if scorer.images is not None:
        files[out / "nearest.png"] = nearest_sheet(images, scorer)
    save_all(files)


def nearest_sheet(images: PixelSet, scorer: Scorer) -> Image.Image:
    """The images that are nearest to one of the reference, each beside that one."""
    assert scorer.images is not None
    distances, rows = scorer.nearest(images)
    order = distances.argsort()[:SHOWN]
    own = pictures(images, order.tolist())
    theirs = pictures(scorer.images, rows[order].tolist())
    pairs = zip(distances[order].tolist(), own, theirs, strict=True)
    groups = [(f"{distance:.3g}", [a, b]) for distance, a, b in pairs]
    return sheet(groups, "the images nearest to one of the reference, with their distance")


def reconstruction_sheet(worst: Sequence[tuple[float, Tensor, Tensor]]) -> Image.Image:
    """Originals beside their reconstructions, as given: (PSNR, original, reconstruction)."""
    groups = [(f"{db:.1f} dB", [to_picture(a), to_picture(b)]) for db, a, b in worst]
    return sheet(groups, "originals and reconstructions, the worst first")


def pictures(images: PixelSet, indices: list[int]) -> list[Image.Image]:
    """The images of these numbers, in this order; reads the set up to the last of them."""
    wanted, found, start = set(indices), {}, 0
    for batch in images.batches(64):
        for i in wanted.intersection(range(start, start + len(batch))):
            found[i] = to_picture(batch[i - start])
        start += len(batch)
        if start > max(wanted):
            break
    return [found[i] for i in indices]


def to_picture(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) as a picture."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())
