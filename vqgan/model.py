"""The VQGAN tokenizer's network (Esser et al. 2021, Taming Transformers, appendix; section 3.1).

Shape legend: B images, C channels, H x W pixels, h x w tokens (h = H / factor), D code width.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit.common import UserError, pick
from maskgit.common.folder import find, load_module, save_module
from maskgit.common.precision import widen
from vqgan.quantizer import Quantizer, QuantizerConfig


@dataclass
class VQGANConfig:
    """What the published tokenizers differ in. The defaults are MaskGIT's (54.5 million weights).

    `mult` gives one level per entry, each but the last halving the image: the factor is
    2 ** (len(mult) - 1). `attention` holds the levels (0 is the full resolution) whose blocks are
    followed by attention. `down` "conv" is a 3x3 stride-2 convolution padded right and below,
    "pool" a 2x2 mean. `shortcut` "input" adds a 1x1 convolution of the block's input where the
    width changes; "output" is MaskGIT's quirk: a 1x1 convolution of the block's own output, the
    input dropped. `biasless` drops the biases of the encoder's first and all blocks' convolutions.
    """

    channels: int = 128
    mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    encoder_blocks: int = 2  # residual blocks a level
    decoder_blocks: int = 2
    z_channels: int = 256
    attention: list[int] = field(default_factory=list)
    middle_attention: bool = False
    down: str = "pool"
    shortcut: str = "output"
    biasless: bool = True
    out_kernel: int = 1  # of the encoder's last convolution
    quant_conv: bool = False  # 1x1 convolutions around the quantizer, z_channels <-> code width
    groups: int = 32
    eps: float = 1e-6  # of every GroupNorm; torch's default is another
    signed: bool = False  # trained on images in [-1, 1] instead of [0, 1]
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, dict):
            self.quantizer = QuantizerConfig(**self.quantizer)
        pick({"conv": 0, "pool": 0}, self.down, "downsampling")
        pick({"input": 0, "output": 0}, self.shortcut, "shortcut")
        widths = [self.channels * m for m in self.mult]
        if not widths or self.groups < 1 or min(widths) < 1 or any(w % self.groups for w in widths):
            raise UserError(
                f"groups={self.groups} must divide the width of each level, channels times mult, "
                f"which is {widths}"
            )
        if any(not 0 <= level < len(widths) for level in self.attention):
            raise UserError(f"attention={self.attention}: the levels are 0 to {len(widths) - 1}")
        if not self.quant_conv and self.quantizer.dim != self.z_channels:
            raise UserError("quantizer.dim must equal z_channels unless quant_conv is set")

    @property
    def factor(self) -> int:
        """Pixels per token along each side."""
        return 2 ** (len(self.mult) - 1)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size


class ResBlock(nn.Module):
    """GroupNorm, swish, 3x3 convolution, twice, and a shortcut."""

    def __init__(self, c: VQGANConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        bias = not c.biasless
        self.norm1 = nn.GroupNorm(c.groups, inputs, c.eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = nn.GroupNorm(c.groups, outputs, c.eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.from_input = c.shortcut == "input"
        if inputs != outputs:
            width = inputs if self.from_input else outputs
            self.shortcut = nn.Conv2d(width, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, outputs, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "shortcut"):
            x = self.shortcut(x if self.from_input else h)
        return x + h


class Attention(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, c: VQGANConfig, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(c.groups, width, c.eps)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h w, C)
        return x + self.out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Down(nn.Module):
    def __init__(self, c: VQGANConfig, width: int) -> None:
        super().__init__()
        if c.down == "conv":
            self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "conv"):
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and below only, as published
        return F.avg_pool2d(x, 2)


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _level(c: VQGANConfig, level: int, blocks: int, inputs: int) -> list[nn.Module]:
    """The blocks of one level, each followed by attention where the config places it."""
    outputs = c.channels * c.mult[level]
    layers: list[nn.Module] = []
    for i in range(blocks):
        layers.append(ResBlock(c, inputs if i == 0 else outputs, outputs))
        if level in c.attention:
            layers.append(Attention(c, outputs))
    return layers


def _middle(c: VQGANConfig, width: int) -> list[nn.Module]:
    attention = [Attention(c, width)] if c.middle_attention else []
    return [ResBlock(c, width, width), *attention, ResBlock(c, width, width)]


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, z_channels, h, w)."""

    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, c.channels, 3, padding=1, bias=not c.biasless)
        layers: list[nn.Module] = []
        width = c.channels
        for level, mult in enumerate(c.mult):
            layers += _level(c, level, c.encoder_blocks, width)
            width = c.channels * mult
            if level < len(c.mult) - 1:
                layers.append(Down(c, width))
        self.layers = nn.Sequential(*layers, *_middle(c, width))
        self.norm_out = nn.GroupNorm(c.groups, width, c.eps)
        self.conv_out = nn.Conv2d(width, c.z_channels, c.out_kernel, padding=c.out_kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.conv_in(x))  # (B, C, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, H, W). The layers run from the lowest resolution up."""

    def __init__(self, c: VQGANConfig) -> None:
        super().__init__()
        width = c.channels * c.mult[-1]
        self.conv_in = nn.Conv2d(c.z_channels, width, 3, padding=1)
        layers = _middle(c, width)
        for level in reversed(range(len(c.mult))):
            layers += _level(c, level, c.decoder_blocks, width)
            width = c.channels * c.mult[level]
            if level > 0:
                layers.append(Up(width))
        self.layers = nn.Sequential(*layers)
        self.norm_out = nn.GroupNorm(c.groups, width, c.eps)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.layers(self.conv_in(z))  # (B, C, H, W)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Images to grids of discrete tokens and back."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.quantizer.dim
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config.quantizer)
        self.decoder = Decoder(config)
        self.quant_conv: nn.Module = nn.Identity()
        self.post_quant_conv: nn.Module = nn.Identity()
        if config.quant_conv:
            self.quant_conv = nn.Conv2d(config.z_channels, dim, 1)
            self.post_quant_conv = nn.Conv2d(dim, config.z_channels, 1)
        self.to(memory_format=torch.channels_last)  # convolutions run fastest this way

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D, h, w) before quantization. H, W: multiples of factor."""
        if images.shape[2] % self.config.factor or images.shape[3] % self.config.factor:
            size = "x".join(str(s) for s in images.shape[2:])
            raise UserError(f"image sides must be multiples of {self.config.factor}, not {size}")
        x = images * 2 - 1 if self.config.signed else images
        x = x.to(self.encoder.conv_in.weight.dtype, memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(x))

    def render(self, z: Tensor) -> Tensor:
        """(B, D, h, w) of codes -> (B, 3, H, W), in [0, 1] but for overshoot (not clamped)."""
        z = z.to(self.decoder.conv_in.weight.dtype, memory_format=torch.channels_last)
        x = widen(self.decoder(self.post_quant_conv(z)))
        return (x + 1) / 2 if self.config.signed else x

    def forward(
        self, images: Tensor, beta: float = 0.25, swapped: bool = False, quantize: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One training pass over images (B, 3, H, W) in [0, 1].

        Returns the reconstruction (B, 3, H, W), the latents as rows (B h w, D), their tokens
        (B, h, w) and the quantizer's loss. `quantize=False` leaves the bottleneck out, as a warm
        start does before there is a codebook; its loss is then 0. UserError for a Gumbel codebook.
        """
        if self.config.quantizer.gumbel:
            raise UserError("no training of a Gumbel codebook: set model.quantizer.gumbel=false")
        z = self.latents(images)  # (B, D, h, w)
        rows = self.quantizer.flatten(z)
        if not quantize:
            nothing = 0 * (rows.sum() + self.quantizer.codebook.sum())  # a gradient for each weight
            return self.render(z), rows, z.new_zeros(0, dtype=torch.long), nothing
        code, tokens, loss = self.quantizer(z, beta, swapped)
        return self.render(code), rows, tokens, loss

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens (B, h, w), int64, of images (B, 3, H, W) in [0, 1]."""
        return self.quantizer.lookup(self.latents(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], clamped, of tokens (B, h, w)."""
        return self.render(self.quantizer.embed(tokens)).clamp(0, 1)

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        save_module(folder, self, self.config, half)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> "VQGAN":
        """A tokenizer from its own folder, or from a pipeline's (its `vqgan/`), or by name."""
        folder = find(source, revision)
        folder = folder / "vqgan" if (folder / "vqgan").is_dir() else folder
        return load_module(folder, cls, VQGANConfig)
