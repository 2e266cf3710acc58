"""Reading, scoring and statistics against the bare network: what evaluation adds to its time.

The limit is the extractor on images that are in memory already, in the same run. Memory is that
of a process of its own for each number of images, because a peak cannot be taken back.
"""

import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.table import Row, number
from maskgit.common.device import pick_device
from maskgit.evaluation.extractors import (
    Extractor,
    extract,
    open_extractor,
    wrap_torch_fidelity,
)
from maskgit.evaluation.npz import write_npz
from maskgit.evaluation.sets import PixelSet, open_pixels

FEW, MANY, BATCH = 1_000, 50_000, 64
COLUMNS = {"value": number("value")}


class Unloaded(FeatureExtractorInceptionV3):
    """The Inception network with random weights: for its speed, and for nothing else."""

    def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
        pass


def run(full: bool = False) -> Iterator[Row]:
    """The rows of the table: bare and whole rates in turns, and memory at both numbers."""
    yield from rates(open_extractor("emoji", "auto"), open_pixels("emoji"), turns=5)
    yield from rates(random_inception(), open_pixels("emoji:heldout"), turns=3)
    for count in (FEW, MANY):
        yield {"what": f"peak memory at {count:,} images, MB", "value": peak_memory(count)}


def rates(extractor: Extractor, images: PixelSet, turns: int) -> list[Row]:
    """Medians over some turns of the bare and of the whole rate, and of the one by the other."""
    bare, whole = zip(*(one_turn(extractor, images) for _ in range(turns)), strict=True)
    share = [b / a for a, b in zip(bare, whole, strict=True)]
    named = {"bare, images/s": bare, "files to statistics, images/s": whole, "share": share}
    return [
        {"what": f"{extractor.name}: {what}", "value": statistics.median(values)}
        for what, values in named.items()
    ]


def random_inception() -> Extractor:
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    layers = ["2048", "logits_unbiased"]
    fe = Unloaded("random", layers, feature_extractor_weights_path=empty)
    device = pick_device("auto")
    return wrap_torch_fidelity(fe.to(device), "Inception network", "", device)


def one_turn(extractor: Extractor, images: PixelSet) -> tuple[float, float]:
    """Images a second of the network alone, and from the files to the statistics."""
    batches = list(images.batches(BATCH))
    start = time.perf_counter()
    for batch in batches:
        extractor(batch)[0].sum().item()
    bare = time.perf_counter() - start
    start = time.perf_counter()
    extract(extractor, images, BATCH, keep=False)
    return len(images) / bare, len(images) / (time.perf_counter() - start)


def peak_memory(count: int) -> float:
    """Megabytes that a process holds at most while it takes statistics of `count` images."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "images.npz")
        write_npz(file, repeated(count), count, (64, 64))
        command = [sys.executable, "-m", "benchmarks.evaluation", str(file)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def repeated(count: int) -> Iterator[Tensor]:
    """The bundled drawings over and over."""
    images = torch.cat(list(open_pixels("emoji").batches(BATCH)))
    for start in range(0, count, BATCH):
        rows = torch.arange(start, min(start + BATCH, count)) % len(images)
        yield images[rows]


if __name__ == "__main__":
    extract(open_extractor("emoji", "auto"), open_pixels(sys.argv[1]), BATCH, keep=False)
    # Not getrusage, whose peak a process inherits from the one that started it.
    [peak] = re.findall(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    print(int(peak) / 1024)
