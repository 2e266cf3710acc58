"""Tokens to images and back, against the rate of the convolutions that occur: MaskGIT's tokenizer
at 256 pixels, with random weights, and the bundled one."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.machine import all_convolutions, cuda, measure
from benchmarks.table import LIMITS, Row
from maskgit.common.device import pick_device, pick_dtype
from vqgan import VQGAN, VQGANConfig

COLUMNS = LIMITS


@torch.no_grad()
def run(full: bool = False) -> Iterator[Row]:
    """The rows of the table. full: larger batches too."""
    more = (16, 64) if full or cuda() else ()
    yield from rows("tokenizer at 256", VQGAN(VQGANConfig()), 16, (1, 4, *more[:1]))
    yield from rows("emoji", VQGAN.from_pretrained("emoji"), 8, (1, 16, *more[1:]))


def rows(name: str, vqgan: VQGAN, side: int, batches: tuple[int, ...]) -> Iterator[Row]:
    """Grids of side x side tokens, decoded and tokenized."""
    device = pick_device("auto")
    vqgan.eval().to(device, pick_dtype("auto", device)).quantizer.float()
    take = partial(measure, limit=all_convolutions)
    for batch in batches:
        size = batch, side, side
        tokens = torch.randint(vqgan.config.codebook_size, size, device=device)
        images = vqgan.decode(tokens)
        yield take(f"{name}, batch {batch}, decoding", partial(vqgan.decode, tokens))
        yield take(f"{name}, batch {batch}, tokenizing", partial(vqgan.encode, images))
