"""A small image classifier, whose features tell images apart where no larger network can be had.

The block is He et al. 2016, Identity Mappings in Deep Residual Networks, figure 4e, with group
normalisation, so that an image's features do not depend on what else is in the batch.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.common import UserError
from maskgit.common.folder import find, load_module, save_module
from maskgit.common.precision import widen


@dataclass
class ClassifierConfig:
    """The network's shape: one level of blocks per width, each level halving the image."""

    num_classes: int = 0  # filled from the data
    size: int = 64  # pixels along each side, to which images are brought
    widths: list[int] = field(default_factory=lambda: [32, 64, 128, 128])
    blocks: int = 1  # residual blocks a level
    groups: int = 8  # of every GroupNorm

    def __post_init__(self) -> None:
        if not self.widths or any(w < 1 or w % self.groups for w in self.widths):
            raise UserError(f"groups={self.groups} must divide each of widths={self.widths}")
        if self.blocks < 1 or self.size < 2 ** len(self.widths):
            raise UserError(
                f"blocks={self.blocks} must be 1 or more, size={self.size} at least "
                f"{2 ** len(self.widths)}: each of the {len(self.widths)} levels halves the image"
            )


class Block(nn.Module):
    """GroupNorm, swish, 3x3 convolution, twice, and a shortcut; the first may halve the image."""

    def __init__(self, groups: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, outputs, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        if self.stride > 1:  # a mean, where a strided 1x1 convolution would drop pixels
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return self.shortcut(x) + h


class Classifier(nn.Module):
    """Images to features of width D = widths[-1], and to the logits of their classes."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        blocks = []
        for level, outputs in enumerate(config.widths):
            for i in range(config.blocks):
                stride = 2 if level and i == 0 else 1  # the stem halves for the first level
                blocks.append(Block(config.groups, width, outputs, stride))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(config.groups, width)
        self.head = nn.Linear(width, config.num_classes)
        self.to(memory_format=torch.channels_last)  # convolutions run fastest this way

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], of any size -> (B, D), fp32 or more, before the last layer."""
        side = self.config.size
        if images.shape[2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        x = images * 2 - 1
        x = x.to(self.stem.weight.dtype, memory_format=torch.channels_last)
        x = self.blocks(self.stem(x))  # (B, D, h, w)
        return widen(F.silu(self.norm(x)).mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> logits (B, num_classes)."""
        return widen(self.head(self.features(images).to(self.head.weight.dtype)))

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        save_module(folder, self, self.config, half)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> "Classifier":
        """A classifier from its own folder, or from a run's export (its `classifier/`), or by
        name."""
        folder = find(source, revision)
        folder = folder / "classifier" if (folder / "classifier").is_dir() else folder
        return load_module(folder, cls, ClassifierConfig)
