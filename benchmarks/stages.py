"""Many images from end to end, as `maskgit evaluate generator` draws them, and stage by stage.

On a GPU 50,000 images of the official shape at 256 pixels, with random weights; else some of the
bundled model. While a batch is written the next is drawn: the whole may take less than its stages.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.evaluation import random_inception
from benchmarks.machine import cuda, wait
from benchmarks.sampling import OFFICIAL
from benchmarks.table import TIMES, Row, number
from maskgit import MaskGIT, Pipeline, decode, guided
from maskgit.evaluation.extractors import Extractor, extract, open_extractor
from maskgit.evaluation.generate import draw, image_file, write_image
from maskgit.evaluation.sets import open_pixels
from maskgit.sheet import to_pictures
from vqgan import VQGAN, VQGANConfig

COLUMNS = {**TIMES, "images/s": number("images_per_second")}


@torch.no_grad()
def run(full: bool = False) -> Iterator[Row]:
    """The rows of the table."""
    if cuda():
        pipe = Pipeline(VQGAN(VQGANConfig()), MaskGIT(OFFICIAL)).to("cuda", torch.bfloat16)
        yield from stages("official", pipe, random_inception(), 50_000, 256)
    else:
        pipe = Pipeline.from_pretrained("emoji")
        yield from stages("emoji", pipe, open_extractor("emoji", "auto"), 512, 64)


def stages(
    name: str, pipe: Pipeline, extractor: Extractor, count: int, batch: int
) -> Iterator[Row]:
    """Rows for the whole and for its stages, and one for the features of what was drawn."""
    classes = pipe.transformer.config.num_classes
    labels = torch.arange(count) % classes
    what = f"{name}, {count:,} images"
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder, "drawn")
        yield row(f"{what}, labels to files", count, lambda: drawn_in(drawn, pipe, labels, batch))
        yield from apart(what, pipe, labels.to(pipe.device), batch, Path(folder))
        features = f"{what}, files to features ({extractor.name})"
        images = open_pixels(str(drawn))
        yield row(features, count, lambda: extract(extractor, images, batch, keep=False))


def drawn_in(folder: Path, pipe: Pipeline, labels: Tensor, batch: int) -> None:
    settings = dict(steps=8, guidance=0.0)
    draw(pipe, labels.tolist(), 0, folder, settings, batch)


def apart(what: str, pipe: Pipeline, labels: Tensor, batch: int, folder: Path) -> Iterator[Row]:
    """The stages of the first part, one after the other over all images."""
    tokens: list[Tensor] = []
    images: list[Tensor] = []
    parts = labels.split(batch)

    def sample() -> None:
        mask = pipe.transformer.config.mask_id
        for i, part in enumerate(parts):
            masks = part.new_full((len(part), pipe.transformer.config.tokens), mask)
            seeds = range(i * batch, i * batch + len(part))
            tokens.append(decode(guided(pipe.fast(), part), masks, mask, steps=8, seeds=seeds))

    def render() -> None:
        images.extend((255 * pipe.render(part)).round().byte().cpu() for part in tokens)

    def write() -> None:
        pictures = (picture for part in images for picture in to_pictures(part / 255))
        with ThreadPoolExecutor(cpu_count()) as pool:
            files = (image_file(folder, i) for i in range(len(labels)))
            list(pool.map(lambda file, picture: write_image(file, picture, {}), files, pictures))

    for stage, do in {"tokens": sample, "pixels": render, "PNG files": write}.items():
        yield row(f"{what}, of which {stage}", len(labels), do)


def row(what: str, count: int, do: Callable[[], object]) -> Row:
    """A row of one repeat: what all of this takes."""
    wait()
    start = time.perf_counter()
    do()
    wait()
    seconds = time.perf_counter() - start
    rate = count / seconds
    return {"what": what, "seconds": [seconds], "median": seconds, "images_per_second": rate}
