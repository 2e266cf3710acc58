"""The ResNet of OpenAI's RN50 family (Radford et al. 2021, section 2.4), with its parameter names.

It differs from the usual one in a stem of three convolutions, in average pooling in front of every
convolution that would stride, and in attention instead of a last average.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clip.config import ImageConfig
from maskgit.common import UserError


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; `stride` 2 halves the image by averaging."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.downsample = None
        if stride > 1 or inputs != outputs:
            shortcut = {
                "0": nn.Conv2d(inputs, outputs, 1, bias=False),
                "1": nn.BatchNorm2d(outputs),
            }
            self.downsample = nn.ModuleDict(shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.halve(y)))
        if self.downsample is not None:
            x = self.downsample["1"](self.downsample["0"](self.halve(x)))
        return F.relu(x + y)

    def halve(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class AttentionPool2d(nn.Module):
    """The mean of all positions asks, the mean and all positions answer (section 2.4)."""

    def __init__(self, positions: int, width: int, heads: int, embed: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(positions + 1, width) * width**-0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b d h w -> b (h w) d")
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding  # (B, 1 + N, D)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, d)
        return self.c_proj(rearrange(x, "b h 1 d -> b (h d)"))  # (B, E)


class ModifiedResNet(nn.Module):
    """Pixels (B, 3, H, W), normalised, of the config's size -> (B, E)."""

    def __init__(self, config: ImageConfig, embed: int) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        widths = [width * 2**level for level in range(4)]
        inputs = [width, *(4 * w for w in widths)]
        levels = [_level(inputs[i], widths[i], config.blocks[i], 2 if i else 1) for i in range(4)]
        self.layer1, self.layer2, self.layer3, self.layer4 = levels
        positions = config.grid[0] * config.grid[1]
        self.attnpool = AttentionPool2d(positions, inputs[4], config.heads, embed)
        for name, parameter in self.named_parameters():
            if name.endswith("bn3.weight") and name.startswith("layer"):
                nn.init.zeros_(parameter)  # each block begins as its shortcut

    def forward(self, pixels: Tensor) -> Tensor:
        if list(pixels.shape[2:]) != self.config.size:
            raise UserError(
                f"images of {pixels.shape[3]}x{pixels.shape[2]} pixels: this ResNet takes "
                f"{self.config.size[1]}x{self.config.size[0]}"
            )
        x = pixels.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool2d(x, 2)  # (B, width, H / 4, W / 4)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.attnpool(x)


def _level(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Bottlenecks of one width, of which the first may halve the image."""
    first = Bottleneck(inputs, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))
