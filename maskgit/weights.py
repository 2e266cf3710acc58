"""Transformers that others published: their tensors, by the names in their files -> a MaskGIT.

The kind of file follows from the names, and its sizes from the shapes. The networks are those of
`maskgit.model`, so that reading is renaming, transposing and slicing.

- Official MaskGIT (flax, https://github.com/google-research/maskgit): kernels are (in, out), those
  of the attention split by heads. One table has the rows of 1024 codes, 1000 classes and the mask;
  the released code calls the mask -1, which wraps around to the last row. There is no label for no
  class: number 1000 would be the mask.
- Halton-MaskGIT, version 2 (https://github.com/valeoai/Halton-MaskGIT): named as ours, nearly. The
  heads are not in the file.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from maskgit.common import UserError
from maskgit.common.published import check, fill, skeleton
from maskgit.model import SIZES, MaskGIT, MaskGITConfig
from maskgit.presets import HALTON, OFFICIAL

CLASSES = 1000  # of ImageNet, in the official table behind the codes

# Our names and those of a file; those of the first layer for all of them.
OFFICIAL_NAMES = {
    "net.token_embedding.weight": "Embed_0/word_embeddings/embedding",
    "net.position_embedding": "Embed_0/position_embeddings/embedding",
    "net.embedding_norm.weight": "Embed_0/embeddings_ln/scale",
    "net.embedding_norm.bias": "Embed_0/embeddings_ln/bias",
    "net.head.weight": "MlmLayer_0/mlm_dense/kernel",
    "net.head.bias": "MlmLayer_0/mlm_dense/bias",
    "net.head_norm.weight": "MlmLayer_0/mlm_ln/scale",
    "net.head_norm.bias": "MlmLayer_0/mlm_ln/bias",
    "net.head_bias": "MlmLayer_0/mlm_bias/bias",
}
OFFICIAL_MODULES = {  # of a layer; each has two parameters
    "attention.query": "Attention_0/self_attention/query",
    "attention.key": "Attention_0/self_attention/key",
    "attention.value": "Attention_0/self_attention/value",
    "attention.out": "Attention_0/self_attention/out",
    "norm1": "Attention_0/attention_output_ln",
    "up": "Mlp_0/intermediate_output",
    "down": "Mlp_0/layer_output",
    "norm2": "Mlp_0/layer_output_ln",
}
HALTON_NAMES = {
    "net.label_embedding.weight": "cls_emb.weight",
    "net.token_embedding.weight": "tok_emb.weight",
    "net.position_embedding": "pos_emb.weight",
    "net.registers": "reg_tokens.weight",
    "net.norm.weight": "last_norm.norm_final.weight",
    "net.norm.bias": "last_norm.norm_final.bias",
    "net.modulation.weight": "last_norm.mlp.1.weight",
    "net.modulation.bias": "last_norm.mlp.1.bias",
    "net.head_bias": "head.bias",
}
HALTON_PARAMETERS = {  # of a layer
    "modulation.weight": "mlp.1.weight",
    "modulation.bias": "mlp.1.bias",
    "norm1.weight": "ln1.weight",
    "attention.query.weight": "attn.wq.weight",
    "attention.key.weight": "attn.wk.weight",
    "attention.value.weight": "attn.wv.weight",
    "attention.out.weight": "attn.wo.weight",
    "norm2.weight": "ln2.weight",
    "mlp.gate.weight": "ff.w1.weight",
    "mlp.down.weight": "ff.w2.weight",
    "mlp.up.weight": "ff.w3.weight",
}
# What a file has besides, and why it is not used.
BALLAST = {"head.weight": "tok_emb.weight once more: the head is tied to it"}
# By width, depth and the width of queries, the size's name and its heads.
PUBLISHED = {
    (width, size["depth"], width // heads * heads): (name.removeprefix("halton-"), heads)
    for name, size in SIZES.items()
    if name.startswith("halton-")
    for width, heads in [(size["width"], size["heads"])]
}


def published(
    tensors: Mapping[str, Tensor], heads: int | None = None
) -> tuple[str, MaskGIT] | None:
    """The family's name and the model, in fp32 and eval mode; None for what is neither kind.

    tensors: all that the file holds of the model, names of flax joined with "/".
    heads: of a Halton-MaskGIT of no published size; otherwise they are known.

    Raises UserError, which lists them, for tensors that are missing, left over, of another shape or
    not of floating point, for sizes that leave something open, and for `heads` that contradict the
    file.
    """
    flax = {name.removeprefix("params/"): tensor for name, tensor in tensors.items()}
    if OFFICIAL_NAMES["net.token_embedding.weight"] in flax:
        if len(flax) < len(tensors):
            raise UserError(f"{OFFICIAL}: some tensors stand there with params/ and without it")
        return _official(flax, heads)
    if {"tok_emb.weight", "cls_emb.weight"} & set(tensors):
        return _halton(tensors, heads)
    return None


def _official(tensors: Mapping[str, Tensor], heads: int | None) -> tuple[str, MaskGIT]:
    depth = _depth(tensors, r"TransformerLayer_(\d{1,3})/")
    names = dict(OFFICIAL_NAMES)
    for i in range(depth):
        for ours, theirs in OFFICIAL_MODULES.items():
            weight = "scale" if ours.startswith("norm") else "kernel"
            names[f"net.blocks.{i}.{ours}.weight"] = f"TransformerLayer_{i}/{theirs}/{weight}"
            names[f"net.blocks.{i}.{ours}.bias"] = f"TransformerLayer_{i}/{theirs}/bias"
    what = f"{OFFICIAL}'s transformer"
    check(what, dict.fromkeys(names.values()), tensors)
    rows, width = _sizes(tensors, names["net.token_embedding.weight"], 2)
    positions, _ = _sizes(tensors, names["net.position_embedding"], 2)
    _, own_heads, _ = _sizes(tensors, names["net.blocks.0.attention.query.weight"], 3)
    _, hidden = _sizes(tensors, names["net.blocks.0.up.weight"], 2)
    if rows <= CLASSES + 1:
        raise UserError(
            f"{OFFICIAL}: a table of {rows} rows has no codes beside {CLASSES} classes and the mask"
        )
    _agree(OFFICIAL, heads, own_heads)
    config = MaskGITConfig(
        rows - CLASSES - 1,
        CLASSES,
        _grid(positions - 1, OFFICIAL),
        architecture="official",
        width=width,
        depth=depth,
        heads=own_heads,
        has_null_label=False,
    )
    config.ffn = None if config.hidden == hidden else hidden
    turned = {name: _from_flax(name, array, own_heads) for name, array in tensors.items()}
    return OFFICIAL, fill(what, skeleton(what, lambda: MaskGIT(config)), names, turned)


def _from_flax(name: str, array: Tensor, heads: int) -> Tensor:
    """An array of flax in torch's layout: heads side by side, kernels (out, in)."""
    kernel = name.endswith("/kernel")
    if "/self_attention/" in name:  # (D, heads, d), on the way out (heads, d, D); biases (heads, d)
        axis = int(kernel and "/out/" not in name)
        if array.ndim == 2 + kernel and array.shape[axis] == heads:
            array = array.flatten(axis, axis + 1)
    return array.T if kernel and array.ndim == 2 else array


def _halton(tensors: Mapping[str, Tensor], heads: int | None) -> tuple[str, MaskGIT]:
    depth = _depth(tensors, r"transformer\.layers\.(\d{1,3})\.")
    names = HALTON_NAMES | {
        f"net.blocks.{i}.{ours}": f"transformer.layers.{i}.{theirs}"
        for i in range(depth)
        for ours, theirs in HALTON_PARAMETERS.items()
    }
    what = f"{HALTON}'s transformer"
    kept = {name: tensor for name, tensor in tensors.items() if name not in BALLAST}
    check(what, dict.fromkeys(names.values()), kept)
    table = tensors["tok_emb.weight"]
    if "head.weight" in tensors and not torch.equal(tensors["head.weight"], table):
        raise UserError(
            f"{HALTON}: head.weight is not tok_emb.weight, to which its head is tied: this file is "
            f"of another network, or damaged"
        )
    rows, width = _sizes(tensors, "tok_emb.weight", 2)
    labels, _ = _sizes(tensors, "cls_emb.weight", 2)
    positions, _ = _sizes(tensors, "pos_emb.weight", 2)
    registers, _ = _sizes(tensors, "reg_tokens.weight", 2)
    inner, _ = _sizes(tensors, names["net.blocks.0.attention.query.weight"], 2)
    hidden, _ = _sizes(tensors, names["net.blocks.0.mlp.gate.weight"], 2)
    size, own_heads = PUBLISHED.get((width, depth, inner), ("", None))
    if own_heads is not None:
        _agree(f"{HALTON} {size}", heads, own_heads)
    heads = heads or own_heads
    if heads is None:
        listed = ", ".join(f"{width} x {depth}" for width, depth, _ in PUBLISHED)
        raise UserError(
            f"{HALTON} of width x depth {width} x {depth}, queries {inner} wide, is no published "
            f"size ({listed}), and its tensors do not tell the heads: give --heads N"
        )
    if not 1 <= heads <= width or width // heads * heads != inner:
        raise UserError(
            f"{HALTON}: {heads} heads of a width of {width} take queries of "
            f"{width // max(heads, 1) * heads}, and its own have {inner}: give --heads N that fits"
        )
    config = MaskGITConfig(
        rows - 1,
        labels - 1,
        _grid(positions, HALTON),
        width=width,
        depth=depth,
        heads=heads,
        registers=registers,
    )
    config.ffn = None if config.hidden == hidden else hidden
    model = fill(what, skeleton(what, lambda: MaskGIT(config)), names, kept)
    return f"{HALTON} {size}".rstrip(), model


def _agree(family: str, heads: int | None, own: int) -> None:
    """UserError for a number of heads that is asked for where the file tells another."""
    if heads not in (None, own):
        raise UserError(f"{family}: it has {own} heads, not {heads}: leave --heads out")


def _depth(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers there are; at least one, so that something is told as missing."""
    return max(1, len({found[1] for name in tensors if (found := re.match(pattern, name))}))


def _sizes(tensors: Mapping[str, Tensor], name: str, ndim: int) -> list[int]:
    """The shape of a tensor; UserError unless it has `ndim` sides, and numbers."""
    shape = list(tensors[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise UserError(f"{name} has the shape {shape}, and {ndim} sides are expected, none of 0")
    return shape


def _grid(tokens: int, family: str) -> list[int]:
    """The square grid of so many tokens."""
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side**2 != tokens:
        raise UserError(f"{family}: {tokens} positions are no square grid of tokens")
    return [side, side]
