"""The bidirectional transformer that fills in masked tokens, in two architectures.

**official**: the network of MaskGIT (Chang et al. 2022): a BERT with its norms behind the residual
sums. The class is a token of its own in front of the image; codes, classes and the mask share one
embedding table, and the output head is tied to it.

**modern**: the network of Halton-MaskGIT (Besnier et al. 2025): norms in front and steered by the
class (adaptive norm), normalised queries and keys, gated feed-forward, register tokens, tied head.

Shapes: B images, N = h * w tokens in row-major order, K codes, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit.common import UserError, pick
from maskgit.common.folder import find, load_module, save_module
from maskgit.common.precision import widen

# What a named size sets in MaskGITConfig.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(width=64, depth=2, heads=4, ffn=128),
    "emoji": dict(width=256, depth=4, heads=4),
    "halton-tiny": dict(width=384, depth=6, heads=6),
    "halton-small": dict(width=512, depth=12, heads=6),
    "halton-base": dict(width=768, depth=12, heads=12),
    "halton-large": dict(width=1024, depth=24, heads=16),
    "official": dict(architecture="official", width=768, depth=24, heads=16),
}


@dataclass
class MaskGITConfig:
    """The shape of a MaskGIT; the first three come from the tokenizer and the data."""

    codebook_size: int
    num_classes: int  # 0: unconditional
    grid: list[int]  # (h, w) in tokens
    architecture: str = "modern"  # or "official"
    width: int = 384
    depth: int = 6
    heads: int = 6
    ffn: int | None = None  # hidden width of the feed-forward; None: as published, see `hidden`
    registers: int = 1  # extra tokens without a place (modern)
    dropout: float = 0.1
    has_null_label: bool = True  # trained with label dropout, as guidance needs

    def __post_init__(self) -> None:
        self.grid = list(self.grid)  # JSON and YAML have no tuples
        pick(ARCHITECTURES, self.architecture, "architecture")
        if self.depth < 1 or self.registers < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"depth={self.depth}, registers={self.registers}, dropout={self.dropout}: give at "
                f"least 1, at least 0, and a share below 1"
            )
        if not 1 <= self.heads <= self.width:
            raise UserError(f"heads={self.heads} must lie between 1 and the width, {self.width}")

    @property
    def tokens(self) -> int:
        """N, the tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token; the model never predicts it."""
        return self.codebook_size

    @property
    def null_label(self) -> int | None:
        """The label that means "no class", or None for a model that has no such label."""
        return self.num_classes if self.num_classes and self.has_null_label else None

    @property
    def label_rows(self) -> int:
        """Rows of the label table: the classes, and one for "no class" if that can be asked for."""
        return self.num_classes + (self.num_classes == 0 or self.has_null_label)

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward: `ffn`, or the published rule, which is 4 D (official),
        or 2/3 of 4 D rounded up to a multiple of 256, as the gated one has a third matrix."""
        gated = math.ceil(8 * self.width // 3 / 256) * 256
        return self.ffn or (gated if self.architecture == "modern" else 4 * self.width)


class MaskGIT(nn.Module):
    """Predicts the codes of an image from those that are known: logits for every position."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.config = config
        self.net = ARCHITECTURES[config.architecture](config)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Tokens (B, N) int64 in [0, K], K = masked; labels (B,) int64, None = no class (and an
        unconditional model ignores them) -> logits (B, N, K) in fp32, of a float64 model in
        float64."""
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] != config.tokens:
            h, w = config.grid
            raise UserError(
                f"tokens of shape {tuple(tokens.shape)}: this model has {h} x {w} tokens an image, "
                f"so it takes (B, {config.tokens})"
            )
        if labels is None and config.num_classes and config.null_label is None:
            raise UserError("this model was trained without label dropout: give it a class")
        if labels is None or config.num_classes == 0:
            labels = tokens.new_full(tokens.shape[:1], config.num_classes)
        return widen(self.net(tokens, labels))

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write config.json and model.safetensors into a folder, in fp16 if `half`."""
        save_module(folder, self, self.config, half=half)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> MaskGIT:
        """Load from such a folder, or from the `transformer` of a pipeline: a folder, a bundled
        name or a hub id. UserError if it is none of these or not a MaskGIT."""
        folder = find(source, revision)
        inner = folder / "transformer"
        return load_module(inner if inner.is_dir() else folder, cls, MaskGITConfig)


def rms_norm(x: Tensor) -> Tensor:
    """x / RMS(x) over the last axis, computed in fp32 or more."""
    return F.rms_norm(widen(x), x.shape[-1:], eps=1e-5).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention. Where the heads do not divide the width, they are narrower."""

    def __init__(self, config: MaskGITConfig, bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.qk_norm = config.heads, config.dropout, qk_norm
        inner = config.width // config.heads * config.heads
        self.query = nn.Linear(config.width, inner, bias=bias)
        self.key = nn.Linear(config.width, inner, bias=bias)
        self.value = nn.Linear(config.width, inner, bias=bias)
        self.out = nn.Linear(inner, config.width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.qk_norm:  # over all heads at once, before they are split
            q, k = rms_norm(q), rms_norm(k)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, heads, N, d)
        x = self.out(rearrange(x, "b h n d -> b n (h d)"))  # (B, N, D)
        return F.dropout(x, self.dropout, self.training)


# ---------------------------------------------------------------- modern


class RMSNorm(nn.Module):
    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = rms_norm(x) * self.weight
        return x if self.bias is None else x + self.bias


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.gate(x)) * self.up(x)  # (B, N, hidden)
        return self.down(F.dropout(x, self.dropout, self.training))


class ModernBlock(nn.Module):
    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.width, 6 * config.width)
        self.norm1 = RMSNorm(config.width)
        self.attention = Attention(config, bias=False, qk_norm=True)
        self.norm2 = RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, config.hidden, config.dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Modern(nn.Module):
    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.codes, width = config.codebook_size, config.width
        self.label_embedding = nn.Embedding(config.label_rows, width)
        self.token_embedding = nn.Embedding(self.codes + 1, width)  # the last row is the mask
        self.position_embedding = nn.Parameter(torch.empty(config.tokens, width))
        self.registers = nn.Parameter(torch.empty(config.registers, width))
        self.blocks = nn.ModuleList(ModernBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(width, bias=True)
        self.modulation = nn.Linear(width, 2 * width)
        self.head_bias = nn.Parameter(torch.zeros(self.codes + 1))
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or ".modulation" in name:
                nn.init.zeros_(parameter)  # gates of 0: each block begins as the identity
            elif "embedding" in name or name == "registers":
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        c = F.silu(self.label_embedding(labels))[:, None]  # (B, 1, D)
        x = self.token_embedding(tokens) + self.position_embedding  # (B, N, D)
        x = torch.cat([x, self.registers.expand(len(x), -1, -1)], 1)  # (B, N + registers, D)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        x = self.norm(x[:, : tokens.shape[1]]) * (1 + scale) + shift  # (B, N, D)
        weight, bias = self.token_embedding.weight, self.head_bias
        return F.linear(x, weight[: self.codes], bias[: self.codes])  # (B, N, K): no mask


# ---------------------------------------------------------------- official


class OfficialBlock(nn.Module):
    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention = Attention(config, bias=True, qk_norm=False)
        self.norm1 = nn.LayerNorm(config.width, eps=1e-12)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        y = self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.norm2(x + F.dropout(y, self.dropout, self.training))


class Official(nn.Module):
    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.codes, self.dropout, width = config.codebook_size, config.dropout, config.width
        rows = self.codes + config.label_rows + 1  # codes, labels, the mask
        self.token_embedding = nn.Embedding(rows, width)
        self.position_embedding = nn.Parameter(torch.empty(1 + config.tokens, width))
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(OfficialBlock(config) for _ in range(config.depth))
        self.head = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=1e-12)
        self.head_bias = nn.Parameter(torch.zeros(rows))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        table = self.token_embedding.weight
        label = F.embedding(labels, table[self.codes : -1])[:, None]  # (B, 1, D)
        tokens = torch.where(tokens == self.codes, len(table) - 1, tokens)
        x = torch.cat([label, self.token_embedding(tokens)], dim=1)  # (B, 1 + N, D)
        x = self.embedding_norm(x + self.position_embedding)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        x = self.head_norm(F.gelu(self.head(x[:, 1:]), approximate="tanh"))  # (B, N, D)
        return F.linear(x, table[: self.codes], self.head_bias[: self.codes])  # (B, N, K)


ARCHITECTURES = {"modern": Modern, "official": Official}
