"""The transformer that both towers of a CLIP are made of, with OpenAI's parameter names."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clip.config import ImageConfig, TextConfig


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): near GELU, but up to 0.02 away, which the features show."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


class Attention(nn.Module):
    """Multi-head self-attention, with the parameters of torch's MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3 D)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, N, d)
        return self.out_proj(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Attention and feed-forward, each added to what comes in, with a norm in front."""

    def __init__(self, config: ImageConfig | TextConfig, dropout: float) -> None:
        super().__init__()
        width = config.width
        self.ln_1 = nn.LayerNorm(width, config.eps)
        self.attn = Attention(width, config.heads)
        self.ln_2 = nn.LayerNorm(width, config.eps)
        self.mlp = MLP(width, config.hidden or 4 * width, config.activation)
        self.dropout = nn.Dropout(dropout)
        # deviations as in OpenAI's release
        nn.init.normal_(self.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=(2 * width * config.depth) ** -0.5)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=(2 * width * config.depth) ** -0.5)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), causal))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """(B, N, D) -> (B, N, D); causal: a position sees those up to its own."""

    def __init__(
        self, config: ImageConfig | TextConfig, dropout: float, causal: bool = False
    ) -> None:
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList(Block(config, dropout) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, self.causal)
        return x
