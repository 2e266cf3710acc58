"""A tiny tokenizer and the shards of a token cache, for the tests of these."""

import torch

from vqgan import VQGAN, VQGANConfig
from vqgan.quantizer import QuantizerConfig


def save_tokenizer(folder, codes=16, seed=0):
    """A tokenizer with random weights, of 4 pixels a token, in a folder."""
    torch.manual_seed(seed)
    shape = (8, [1, 1, 2], 1, 1, 8)
    made = VQGANConfig(*shape, groups=4, shortcut="input", quantizer=QuantizerConfig(codes, 8))
    VQGAN(made).save_pretrained(folder)
    return folder


def shards(folder):
    """The content of each shard, by its name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("tokens-*"))}
