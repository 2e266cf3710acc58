"""The transformer as decoding needs it: the same logits, sooner. Nothing here is for training.

`fast(model)` is a MaskGIT to be called in place of `model`. What it does otherwise:

- queries, keys and values are one product, as are gate and up; large results are overwritten;
- on a processor, fp32 weights lie as its products read them fastest;
- on a processor, what depends on the class alone, the modulations of adaptive norms, is computed
  once a decoding;
- on a processor, an image of masks alone is computed once a class, and kept for later batches;
- on a processor, the last block asks and the head answers only where tokens are masked. Logits at
  known positions, which no decoder reads, are 0 where any image of the batch has some;
- on a processor, a batch is taken in parts whose widest activations fit its cache, and each thread
  computes parts of its own where there is enough for all.

Which tokens are masked is looked at on a processor alone: elsewhere that would be a wait for it.

Shapes: B images, N tokens, n = N and those that are no image's, D width, m positions asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit.common import UserError
from maskgit.int8 import Int8Product
from maskgit.model import Attention, MaskGIT, MaskGITConfig
from maskgit.products import Product
from maskgit.threads import by_threads, threads_apart

# As measured on two cores with AVX2.
CACHE = 2**24  # bytes of the widest activations of the images that are computed at a time
ENOUGH = 2**21  # of these bytes, what is enough for a thread of its own
KEPT = 2**28  # bytes of logits of masks alone that are kept


def fast(model: MaskGIT, int8: bool = False) -> MaskGIT:
    """`model`, for inference: same config, checks and logits, but for those of known positions,
    which may be 0. It has copies of weights: after a change of the model's, make it anew.

    int8: the products of the blocks in int8 (see `maskgit.int8`), which changes the logits.
    What is compiled, or no plain MaskGIT, is given back as it is; with int8, UserError.
    """
    if type(model) is not MaskGIT or model._compiled_call_impl is not None:
        if int8:
            raise UserError("dtype int8: the model is compiled or a class of its own: take fp32")
        return model
    result = MaskGIT.__new__(MaskGIT)
    nn.Module.__init__(result)
    result.config = model.config
    product = Int8Product if int8 else Product
    net: Any = NETS[model.config.architecture](model.config, model.net, product)
    result.net = net  # no module: it owns no weights
    return result.eval()


def stamp(model: nn.Module) -> list[tuple[int, int, torch.dtype]]:
    """Something else after each change of a model's weights."""
    return [
        (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in model.parameters()
    ]


def rows(at: Tensor, n: int) -> Tensor:
    """Positions (B, m) of n, as row numbers (B m,) of the images' tokens one after the other."""
    return (at + n * torch.arange(len(at), device=at.device)[:, None]).flatten()


def take(x: Tensor, at: Tensor | None) -> Tensor:
    """The rows of x (B, n, D) at positions (B, m), or all of them."""
    if at is None:
        return x
    return x.flatten(0, 1).index_select(0, rows(at, x.shape[1])).view(*at.shape, x.shape[-1])


def spread(values: Tensor, at: Tensor | None, n: int) -> Tensor:
    """Values (B, m, K) at positions (B, m) of n, and 0 at the others -> (B, n, K)."""
    if at is None:
        return values
    result = values.new_zeros(len(values), n, values.shape[-1])
    result.flatten(0, 1).index_copy_(0, rows(at, n), values.flatten(0, 1))
    return result


class Fused:
    """Attention with one product for queries, keys and values; two in the last block, which may be
    asked at some positions alone."""

    def __init__(self, layer: Attention, last: bool, product: type[Product]) -> None:
        self.heads, self.qk_norm = layer.heads, layer.qk_norm
        self.ask = product(layer.query) if last else None
        asked = [] if last else [layer.query]
        self.tell = product(*asked, layer.key, layer.value)
        self.out = product(layer.out)

    def __call__(self, x: Tensor, at: Tensor | None, buffer: Tensor) -> Tensor:
        """x (B, n, D); from the positions at (B, m), None for all, to all -> (B, m, D)."""
        q, k, v = self.project(x, at, buffer)
        if self.qk_norm:
            q, k = (F.rms_norm(t, t.shape[-1:], eps=1e-5) for t in (q, k))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, m, d)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))

    def project(self, x: Tensor, at: Tensor | None, buffer: Tensor) -> tuple[Tensor, ...]:
        """Queries at the positions, keys and values at all."""
        if self.ask is None:
            return self.tell(x, buffer).chunk(3, -1)
        return self.ask(take(x, at)), *self.tell(x, buffer).chunk(2, -1)


class Net(ABC):
    """What both architectures have in common: which images and positions are computed, and when.

    A condition is what a network wants to know of the labels, (B, ...), and computes of them alone.
    """

    up: list[Product]  # of each block, the first half of its feed-forward layer
    extra: int  # tokens that are no image's

    def __init__(self, config: MaskGITConfig, blocks: Any, product: type[Product]) -> None:
        self.config, self.codes = config, config.codebook_size
        last = len(blocks) - 1
        self.attention = [Fused(b.attention, i == last, product) for i, b in enumerate(blocks)]
        self.first: dict[int, Tensor] = {}  # label -> logits (N, K) of masks alone
        self.last: tuple[Tensor, Tensor] | None = None  # labels, their condition

    @property
    def widest(self) -> int:
        """Numbers a token in the widest activations."""
        return max(self.attention[0].tell.outputs, self.up[0].outputs)

    def buffer(self, x: Tensor) -> Tensor:
        """Room for the widest activations of the tokens x (B, n, D)."""
        return x.new_empty(x.shape[0] * x.shape[1] * self.widest)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Tokens (B, N), labels (B,) -> logits (B, N, K)."""
        if not tokens.is_cpu:
            return self.compute(tokens, self.condition(labels), None)
        masked = tokens == self.codes
        if len(tokens) and masked.all():
            return self.of_masks(tokens, labels)
        return self.in_parts(tokens, self.known(labels), places(masked))

    def of_masks(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The logits of images of masks alone: computed once a class."""
        asked = labels.tolist()
        kept = self.first  # another thread may put another one in its place
        new = [label for label in dict.fromkeys(asked) if label not in kept]
        found = {label: kept[label] for label in asked if label not in new}
        if new:
            condition = self.condition(labels.new_tensor(new))
            logits = self.in_parts(tokens[: len(new)], condition, None)
            found |= zip(new, map(torch.clone, logits), strict=True)  # each is freed by itself
        room = max(1, KEPT // next(iter(found.values())).nbytes)
        self.first = dict(list({**self.first, **found}.items())[-room:])
        return torch.stack([found[label] for label in asked])

    def known(self, labels: Tensor) -> Tensor:
        """The condition, which is the same at all steps of a decoding."""
        last = self.last
        if last is None or not torch.equal(last[0], labels):
            last = self.last = labels.clone(), self.condition(labels)
        return last[1]

    def in_parts(self, tokens: Tensor, condition: Tensor, at: Tensor | None) -> Tensor:
        """Compute as many images at a time as fit the cache, by threads of their own where these
        can be dealt out evenly and have enough to do.

        Tokens (B, N), condition (B, ...), positions (B, m) or None for all -> logits (B, N, K).
        """
        count, threads = len(tokens), threads_apart()
        of_one = (self.extra + tokens.shape[1]) * self.widest * condition.element_size()
        if count % threads or count * of_one < threads * ENOUGH:
            threads = 1  # all work together
        fit = max(1, CACHE // of_one // threads)
        number = threads * -(-count // (fit * threads))
        if number <= 1:
            return self.compute(tokens, condition, at)
        spots = [None] * number if at is None else at.tensor_split(number)
        parts = zip(tokens.tensor_split(number), condition.tensor_split(number), spots, strict=True)
        if threads > 1:
            return torch.cat(by_threads(self.compute, parts))
        return torch.cat([self.compute(*part) for part in parts])

    @abstractmethod
    def condition(self, labels: Tensor) -> Tensor:
        """Labels (B,) -> what the network wants to know of them, (B, ...)."""

    @abstractmethod
    def compute(self, tokens: Tensor, condition: Tensor, at: Tensor | None) -> Tensor:
        """Logits (B, N, K) at positions (B, m), and 0 at the others; None for all."""


def places(masked: Tensor) -> Tensor | None:
    """The positions (B, m) of the masked tokens of each image, and some others for an image that
    has fewer of them than the rest; None where one is masked all over."""
    most = int(masked.sum(1).max()) if len(masked) else 0
    order = masked.byte().argsort(dim=1, descending=True, stable=True)
    return None if most == masked.shape[1] else order[:, :most]


class FastOfficial(Net):
    """`Official`. The condition is the class's own token."""

    extra = 1

    def __init__(self, config: MaskGITConfig, net: Any, product: type[Product]) -> None:
        super().__init__(config, net.blocks, product)
        self.net = net
        self.up = [product(block.up) for block in net.blocks]
        self.down = [product(block.down) for block in net.blocks]

    def condition(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.net.token_embedding.weight[self.codes : -1])  # (B, D)

    def compute(self, tokens: Tensor, condition: Tensor, at: Tensor | None) -> Tensor:
        net, n = self.net, tokens.shape[1]
        table = net.token_embedding.weight
        x = net.token_embedding(torch.where(tokens == self.codes, len(table) - 1, tokens))
        x = torch.cat([condition[:, None], x], 1)  # (B, 1 + N, D)
        x = net.embedding_norm(x + net.position_embedding)
        buffer = self.buffer(x)
        for i, (block, attention) in enumerate(zip(net.blocks, self.attention, strict=True)):
            asked = at + 1 if attention.ask and at is not None else None
            x = block.norm1(take(x, asked).add(attention(x, asked, buffer)))
            x = block.norm2(self.feed(i, x, buffer).add_(x))
        x = x[:, 1:] if at is None else x
        x = net.head_norm(F.gelu(net.head(x), approximate="tanh"))
        return spread(F.linear(x, table[: self.codes], net.head_bias[: self.codes]), at, n)

    def feed(self, i: int, x: Tensor, buffer: Tensor) -> Tensor:
        """The feed-forward layer of block i, computed in the buffer."""
        return self.down[i](torch.ops.aten.gelu_(self.up[i](x, buffer), approximate="tanh"))


class FastModern(Net):
    """`Modern`. The condition is, for each block, 6 modulations, and 2 for the head: (B, 6 blocks
    + 2, D). A norm's own weight is part of its scale."""

    def __init__(self, config: MaskGITConfig, net: Any, product: type[Product]) -> None:
        super().__init__(config, net.blocks, product)
        self.net, self.extra = net, config.registers
        self.up = [product(block.mlp.gate, block.mlp.up) for block in net.blocks]
        self.down = [product(block.mlp.down) for block in net.blocks]

    def condition(self, labels: Tensor) -> Tensor:
        net = self.net
        c = F.silu(net.label_embedding(labels))
        parts = []
        for block in net.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).chunk(6, -1)
            scale1, scale2 = block.norm1.weight * (1 + scale1), block.norm2.weight * (1 + scale2)
            parts += [shift1, scale1, gate1, shift2, scale2, gate2]
        shift, scale = net.modulation(c).chunk(2, -1)
        parts += [shift + net.norm.bias * (1 + scale), net.norm.weight * (1 + scale)]
        return torch.stack(parts, 1)

    def compute(self, tokens: Tensor, condition: Tensor, at: Tensor | None) -> Tensor:
        net, n = self.net, tokens.shape[1]
        x = net.token_embedding(tokens) + net.position_embedding  # (B, N, D)
        x = torch.cat([x, net.registers.expand(len(x), -1, -1)], 1)  # (B, N + registers, D)
        buffer = self.buffer(x)
        *steered, shift, scale = condition[:, :, None].unbind(1)  # (B, 1, D) each
        for i, attention in enumerate(self.attention):
            asked = at if attention.ask else None
            shift1, scale1, gate1, shift2, scale2, gate2 = steered[6 * i : 6 * i + 6]
            y = attention(steer(x, scale1, shift1), asked, buffer)
            x = torch.addcmul(take(x, asked), gate1, y)
            y = self.feed(i, steer(x, scale2, shift2), buffer)
            x = torch.addcmul(x, gate2, y)
        x = steer(x[:, :n] if at is None else x, scale, shift)
        weight, bias = net.token_embedding.weight, net.head_bias
        return spread(F.linear(x, weight[: self.codes], bias[: self.codes]), at, n)

    def feed(self, i: int, x: Tensor, buffer: Tensor) -> Tensor:
        """The feed-forward layer of block i, computed in the buffer."""
        gate, up = self.up[i](x, buffer).chunk(2, -1)
        return self.down[i](F.silu(gate, inplace=True).mul_(up))


def steer(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (B, n, D) / RMS(x) * scale + shift."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=1e-5), scale)


NETS = {"modern": FastModern, "official": FastOfficial}
