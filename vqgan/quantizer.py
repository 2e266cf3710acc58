"""Nearest-code lookup: the discrete bottleneck of the tokenizer (van den Oord et al. 2017, 3.1).

How a codebook learns beyond its gradient (moving average, k-means start, restart of dead codes,
entropy) concerns training only and lives in `codebook.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit.common import UserError
from maskgit.common.precision import widen


@dataclass
class QuantizerConfig:
    """`normalize` compares and returns unit vectors, latents and codes alike (LlamaGen's way).

    `gumbel` takes the code of the greatest logit instead of the nearest, as taming-transformers'
    Gumbel codebooks have them (Jang et al. 2016); it is for use only and not for training.
    """

    codebook_size: int = 1024
    dim: int = 256
    normalize: bool = False
    gumbel: bool = False

    def __post_init__(self) -> None:
        if self.codebook_size < 1 or self.dim < 1:
            raise UserError(f"a codebook of {self.codebook_size} codes of width {self.dim} is none")


class Quantizer(nn.Module):
    """A codebook (K, D) and the two directions through it."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.normalize = config.normalize
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.dim))
        nn.init.uniform_(self.codebook, -1 / config.codebook_size, 1 / config.codebook_size)
        if config.gumbel:
            self.proj = nn.Conv2d(config.dim, config.codebook_size, 1)  # to logits

    def codes(self) -> Tensor:
        """The codebook as it is compared and returned, fp32 or more (K, D)."""
        codes = widen(self.codebook)
        return F.normalize(codes, dim=1) if self.normalize else codes

    def flatten(self, z: Tensor) -> Tensor:
        """Latents (B, D, h, w) as rows (B h w, D), fp32 or more, row-major; unit length if
        `normalize`."""
        rows = rearrange(widen(z), "b d h w -> (b h w) d")
        return F.normalize(rows, dim=1) if self.normalize else rows

    @torch.no_grad()
    def lookup(self, z: Tensor) -> Tensor:
        """Tokens (B, h, w) of the codes nearest to latents (B, D, h, w).

        Distances are fp32 or more whatever the latents are: bfloat16 ones change several tokens in
        100.
        """
        return self.nearest(self.flatten(z)).view(z.shape[0], *z.shape[2:])

    def nearest(self, rows: Tensor) -> Tensor:
        """Ids (M,) of the codes nearest to `rows` (M, D), as `flatten` gives them, or of the
        greatest logits."""
        with torch.autocast(rows.device.type, enabled=False):
            if hasattr(self, "proj"):  # without the noise that published code draws even in eval
                kernel, bias = map(widen, self.proj.parameters())
                return F.linear(rows, kernel.flatten(1), bias).argmax(1)  # of (M, K)
            codes = self.codes()
            distance = codes.square().sum(1) - 2 * rows @ codes.T  # (M, K), less |row|^2
        return distance.argmin(1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes (B, D, h, w) of tokens (B, h, w)."""
        return rearrange(F.embedding(tokens, self.codes()), "b h w d -> b d h w")

    def forward(self, z: Tensor, beta: float = 0.25, swapped: bool = False) -> tuple:
        """Quantize latents (B, D, h, w) for training.

        Returns the codes (B, D, h, w) with the gradient passed straight through to `z`, the tokens
        (B, h, w), and the loss |sg(z) - code|^2 + beta |z - sg(code)|^2, the mean over all
        elements: `beta` weighs the commitment. `swapped` puts it on the codebook's term instead,
        as taming-transformers' published models were trained.
        """
        tokens = self.lookup(z)
        z = widen(z)
        if self.normalize:
            z = F.normalize(z, dim=1)
        code = self.embed(tokens)
        commitment = F.mse_loss(z, code.detach())
        codebook = F.mse_loss(code, z.detach())
        loss = beta * codebook + commitment if swapped else codebook + beta * commitment
        return z + (code - z).detach(), tokens, loss
