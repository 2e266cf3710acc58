"""Random numbers as a function of (seed, step, position, stream): a seed names an image, and in
training one sample of the endless stream.

There is no generator and no state, so batch size, order and the number of processes change
nothing. All arithmetic is on integers below 2^63, which every device and compiler agrees on.
"""

import torch
from torch import Tensor

# Streams, one for each thing that is drawn. Decoding: the token, the Gumbel noise of the choice,
# where an order of positions begins.
TOKEN, CHOICE, ORDER = 0, 1, 8
# Training: how much is masked and where, whether the label is dropped, how an image is varied,
# which of its captions and which of its cached variants (mirrored, cropped) is taken.
MASK_RATIO, MASK, LABEL, VARY, CAPTION, VARIANT = 2, 3, 4, 5, 6, 7

_LOW = 0xFFFFFFFF
# Any two will do: they make two keys of 32 bits from the same words, so that no two images are
# likely to share both.
_SALTS = 0x243F6A88, 0x85A308D3


def uniform(seeds: Tensor, step: int, n: int, stream: int) -> Tensor:
    """Numbers for `n` positions of each image, float32 (B, n), uniform in the open (0, 1).

    seeds: (B,) int64, any values. step, stream: ints >= 0. The result is a multiple of 2^-24, at
    least that far from 0 and from 1, so that its logarithms are finite.
    """
    seeds = seeds[:, None]  # (B, 1)
    position = torch.arange(n, device=seeds.device)
    a, b = (_key(salt, seeds & _LOW, seeds >> 32 & _LOW, step, stream) for salt in _SALTS)
    bits = _mix(b ^ _mix(a ^ position))  # (B, n)
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def _key(salt: int, low: Tensor, *words: Tensor | int) -> Tensor:
    key = _mix(salt ^ low)
    for word in words:
        key = _mix(key ^ word)
    return key


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which each bit of x changes each of the result's half the time.

    Twice multiply and fold, with an odd constant below 2^31: no product leaves int64.
    """
    for _ in range(2):
        x = (x ^ x >> 16) * 0x45D9F3B & _LOW
    return x ^ x >> 16
