"""CLIP: an image tower and a text tower whose features lie close where the two belong together.

Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, with the
variants that published weights have (see `ImageConfig` and `TextConfig`). Parameters carry the
names of OpenAI's release, which nearly everybody's files have too.

Shapes: B images or texts, N patches, L text positions, D width, E width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clip.config import CLIPConfig, ImageConfig
from clip.preprocess import preprocess
from clip.tokenizer import Tokenizer
from clip.transformer import MLP, Transformer
from maskgit.common import UserError
from maskgit.common.folder import save_module
from maskgit.common.precision import widen

if TYPE_CHECKING:
    from PIL.Image import Image


class AttentionPool(nn.Module):
    """SigLIP's head: one learnt query looks at all patches; then a feed-forward."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, config.eps)
        self.mlp = MLP(width, config.hidden or 4 * width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        weights, biases = self.in_proj_weight.split(len(self.probe)), self.in_proj_bias.chunk(3)
        q = F.linear(self.probe, weights[0], biases[0]).expand(len(x), 1, -1)  # (B, 1, D)
        k, v = (F.linear(x, w, b) for w, b in zip(weights[1:], biases[1:], strict=True))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, d)
        x = self.out_proj(rearrange(x, "b h 1 d -> b (h d)"))  # (B, D)
        return x + self.mlp(self.norm(x))


class VisionTransformer(nn.Module):
    """Pixels (B, 3, H, W), normalised, of any size that the patch divides -> (B, E)."""

    def __init__(self, config: ImageConfig, embed: int, dropout: float) -> None:
        super().__init__()
        self.config, width = config, config.width
        attention = config.pool == "attention"
        self.conv1 = nn.Conv2d(3, width, config.patch, config.patch, bias=attention)
        rows = config.grid[0] * config.grid[1] + (not attention)
        if not attention:
            self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(rows, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width, config.eps) if config.pool == "class" else nn.Identity()
        self.transformer = Transformer(config, dropout)
        self.ln_post = nn.LayerNorm(width, config.eps)
        if attention:
            self.attn_pool = AttentionPool(config)
        else:
            self.proj = nn.Linear(width, embed, bias=False)
            nn.init.normal_(self.proj.weight, std=width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        own = list(pixels.shape[2:]) == self.config.size
        if not own and any(side % self.config.patch for side in pixels.shape[2:]):
            raise UserError(
                f"images of {pixels.shape[3]}x{pixels.shape[2]} pixels: sides have to be multiples "
                f"of the patch, {self.config.patch}"
            )
        x = self.conv1(pixels)  # (B, D, h, w)
        grid = x.shape[2:]
        x = rearrange(x, "b d h w -> b (h w) d")  # (B, N, D)
        positions, pool = self.positions(grid), self.config.pool
        first = positions[: len(positions) - x.shape[1]]  # (1, D), the class token's; or (0, D)
        x = self.drop_patches(x + positions[len(first) :])
        if pool != "attention":
            token = (self.class_embedding + first).expand(len(x), 1, -1)
            x = torch.cat([token, x], 1)  # (B, 1 + N, D)
        x = self.transformer(self.ln_pre(x))
        if pool == "attention":
            return self.attn_pool(self.ln_post(x))
        x = x[:, 0] if pool == "class" else x[:, 1:].mean(1)  # (B, D)
        return self.proj(self.ln_post(x))

    def positions(self, grid: Sequence[int]) -> Tensor:
        """The positional embedding, stretched to another grid than it was made for."""
        own = self.config.grid
        if tuple(grid) == own:
            return self.positional_embedding
        first, rows = self.positional_embedding.tensor_split([-own[0] * own[1]])
        rows = rearrange(rows, "(h w) d -> 1 d h w", h=own[0])
        rows = F.interpolate(rows, tuple(grid), mode="bicubic", antialias=True)
        return torch.cat([first, rearrange(rows, "1 d h w -> (h w) d")])

    def drop_patches(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N', D): in training, a share of each image's patches is left out."""
        share = self.config.patch_dropout
        if not self.training or share == 0:
            return x
        kept = max(1, round(x.shape[1] * (1 - share)))
        order = torch.rand(x.shape[:2], device=x.device).argsort(1)[:, :kept]
        return x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))


class TextTransformer(nn.Module):
    """Ids (B, L) int64 -> (B, E)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config, text = config.text, config.text
        self.token_embedding = nn.Embedding(text.rows, text.width)
        self.positional_embedding = nn.Parameter(torch.randn(text.context, text.width) * 0.01)
        self.transformer = Transformer(text, config.dropout, text.causal)
        self.ln_final = nn.LayerNorm(text.width, text.eps)
        self.text_projection = nn.Linear(text.width, config.embed, bias=text.bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.ndim != 2 or ids.shape[1] != self.config.context:
            raise UserError(
                f"ids of shape {tuple(ids.shape)}: this model takes (B, {self.config.context})"
            )
        x = self.token_embedding(ids) + self.positional_embedding  # (B, L, D)
        x = self.transformer(x)
        if self.config.causal:  # the end token has the highest id, and saw all before it
            x = x[torch.arange(len(x), device=x.device), ids.argmax(1)]  # (B, D)
        else:
            x = x[:, -1]
        return self.text_projection(self.ln_final(x))


def image_tower(config: CLIPConfig) -> nn.Module:
    """The network that `config.image` describes: normalised pixels (B, 3, H, W) -> (B, E)."""
    if config.image.tower == "vit":
        return VisionTransformer(config.image, config.embed, config.dropout)
    if config.image.tower == "resnet":
        from clip.resnet import ModifiedResNet

        return ModifiedResNet(config.image, config.embed)
    from clip.timm_tower import TimmTower

    return TimmTower(config.image, config.embed)


class CLIP(nn.Module):
    """Features of images and of texts, and the scale (and bias) by which they are compared."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = image_tower(config)
        self.text = TextTransformer(config)
        self.logit_scale = nn.Parameter(torch.tensor(config.log_scale))  # the logarithm
        self.logit_bias: nn.Parameter | None = None
        if config.loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(config.bias))

    def forward(self, pixels: Tensor | None, ids: Tensor | None) -> tuple[Any, Any]:
        """Unit-length features (B, E) of images and of texts; None of what is None."""
        image = None if pixels is None else self.encode_image(pixels)
        return image, None if ids is None else self.encode_text(ids)

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Pixels (B, 3, H, W) as `preprocess` gives them -> (B, E), fp32 or more; of unit length,
        unless `normalize` is False."""
        return _finish(self.visual(pixels.to(self.dtype)), normalize)

    def encode_text(self, ids: Tensor, normalize: bool = True) -> Tensor:
        """Ids (B, L) as `tokenize` gives them -> (B, E), likewise."""
        return _finish(self.text(ids), normalize)

    def preprocess(self, images: Sequence[Image] | Tensor) -> Tensor:
        """PIL images, or (B, 3, H, W) in [0, 1] -> pixels (B, 3, h, w) as the image tower takes
        them, on the model's device."""
        return preprocess(images, self.config).to(self.device)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> ids (B, L) int64 on the model's device; of a text that is too long (see
        `tokenizer.too_long`), the end is cut off and the end token kept."""
        return self.tokenizer(texts).to(self.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        merges, context = self.config.text.merges, self.config.text.context
        if merges is None:
            raise UserError(
                "this model was trained with another tokenizer than OpenAI's: give the ids that "
                "its own makes to encode_text"
            )
        return Tokenizer(merges, context)

    def tower(self, side: str) -> Any:
        """The tower of "image" or "text"."""
        return {"image": self.visual, "text": self.text}[side]

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text.token_embedding.weight.dtype

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write config.json, the recipe with it, and model.safetensors (fp16 if `half`)."""
        save_module(folder, self, self.config, half)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, recipe: str | None = None
    ) -> CLIP:
        """Load in fp32 and eval mode: our own folder (or the `clip` of a pipeline's), a bundled
        name, a hub id, or a published file (OpenAI's, OpenCLIP's, Hugging Face's). Nothing in a
        file is executed. Raises UserError, also where the recipe would have to be guessed: give its
        name then, such as "ViT-B-32/openai" (`clip/recipes.py`)."""
        from clip.weights import load_clip

        return load_clip(source, revision, recipe)


def _finish(features: Tensor, normalize: bool) -> Tensor:
    features = widen(features)  # (B, E)
    return F.normalize(features, dim=-1) if normalize else features
