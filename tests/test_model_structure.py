"""The transformer has the names and shapes of the published files."""

import math
import re
from pathlib import Path

import pytest
import torch

from maskgit.model import SIZES, MaskGIT, MaskGITConfig

KEYS = Path(__file__).parent / "keys"  # names and shapes of the published weights


def shapes(config: MaskGITConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MaskGIT(config).named_parameters()}


# The published files' names and shapes, and ours.

HALTON = {
    "net.label_embedding.weight": "cls_emb.weight",
    "net.token_embedding.weight": "tok_emb.weight",
    "net.position_embedding": "pos_emb.weight",
    "net.registers": "reg_tokens.weight",
    "net.norm.weight": "last_norm.norm_final.weight",
    "net.norm.bias": "last_norm.norm_final.bias",
    "net.modulation.weight": "last_norm.mlp.1.weight",
    "net.modulation.bias": "last_norm.mlp.1.bias",
    "net.head_bias": "head.bias",
    "net.blocks.0.modulation.weight": "transformer.layers.0.mlp.1.weight",
    "net.blocks.0.modulation.bias": "transformer.layers.0.mlp.1.bias",
    "net.blocks.0.norm1.weight": "transformer.layers.0.ln1.weight",
    "net.blocks.0.attention.query.weight": "transformer.layers.0.attn.wq.weight",
    "net.blocks.0.attention.key.weight": "transformer.layers.0.attn.wk.weight",
    "net.blocks.0.attention.value.weight": "transformer.layers.0.attn.wv.weight",
    "net.blocks.0.attention.out.weight": "transformer.layers.0.attn.wo.weight",
    "net.blocks.0.norm2.weight": "transformer.layers.0.ln2.weight",
    "net.blocks.0.mlp.gate.weight": "transformer.layers.0.ff.w1.weight",
    "net.blocks.0.mlp.down.weight": "transformer.layers.0.ff.w2.weight",
    "net.blocks.0.mlp.up.weight": "transformer.layers.0.ff.w3.weight",
}
OFFICIAL = {
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
OFFICIAL_LAYER = {
    "attention.query.weight": "Attention_0/self_attention/query/kernel",
    "attention.query.bias": "Attention_0/self_attention/query/bias",
    "attention.key.weight": "Attention_0/self_attention/key/kernel",
    "attention.key.bias": "Attention_0/self_attention/key/bias",
    "attention.value.weight": "Attention_0/self_attention/value/kernel",
    "attention.value.bias": "Attention_0/self_attention/value/bias",
    "attention.out.weight": "Attention_0/self_attention/out/kernel",
    "attention.out.bias": "Attention_0/self_attention/out/bias",
    "norm1.weight": "Attention_0/attention_output_ln/scale",
    "norm1.bias": "Attention_0/attention_output_ln/bias",
    "up.weight": "Mlp_0/intermediate_output/kernel",
    "up.bias": "Mlp_0/intermediate_output/bias",
    "down.weight": "Mlp_0/layer_output/kernel",
    "down.bias": "Mlp_0/layer_output/bias",
    "norm2.weight": "Mlp_0/layer_output_ln/scale",
    "norm2.bias": "Mlp_0/layer_output_ln/bias",
}


def published(file: str) -> dict[str, torch.Tensor]:
    """The arrays that a list in tests/keys names, without their numbers."""
    lines = re.findall(r"^([\w./]+) \(([\d, ]+)\)$", (KEYS / file).read_text(), re.MULTILINE)
    sizes = {name: [int(n) for n in re.findall(r"\d+", shape)] for name, shape in lines}
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}


def test_modern_has_the_structure_of_the_published_weights():
    arrays = published("halton_transformer.txt")
    assert arrays.pop("head.weight").shape == arrays["tok_emb.weight"].shape  # they are tied
    config = MaskGITConfig(16384, 1000, [16, 16], **SIZES["halton-base"] | {"depth": 1})
    ours = {HALTON[name]: shape for name, shape in shapes(config).items()}
    assert ours == {name: tuple(array.shape) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("size", "inner", "hidden", "millions"),
    [
        ("halton-small", 510, 1536, 69),  # six heads of 85
        ("halton-base", 768, 2048, 142),
        ("halton-large", 1024, 2816, 480),
    ],
)
def test_modern_sizes_are_the_published_ones(size, inner, hidden, millions):
    config = MaskGITConfig(16384, 1000, [16, 16], **SIZES[size])
    ours = shapes(config)
    assert ours["net.blocks.0.attention.query.weight"] == (inner, config.width)
    assert ours["net.blocks.0.attention.out.weight"] == (config.width, inner)
    assert ours["net.blocks.0.mlp.gate.weight"] == (hidden, config.width)
    assert round(sum(math.prod(shape) for shape in ours.values()) / 1e6) == millions


def from_flax(name: str, array: torch.Tensor) -> torch.Tensor:
    """An array of the official file in PyTorch's layout: heads merged, kernels transposed."""
    if name.endswith("out/kernel"):
        array = array.flatten(0, 1)
    elif any(part in name for part in ("query", "key", "value")):
        array = array.flatten(-2)
    return array.T if name.endswith("kernel") else array


def test_official_has_the_structure_of_the_published_weights():
    config = MaskGITConfig(1024, 1000, [16, 16], **SIZES["official"], has_null_label=False)
    ours = shapes(config)
    assert len(ours) == 393
    names = {ours_: f"params/{flax}" for ours_, flax in OFFICIAL.items()} | {
        f"net.blocks.0.{ours_}": f"params/TransformerLayer_0/{flax}"
        for ours_, flax in OFFICIAL_LAYER.items()
    }
    first = {names[name]: shape for name, shape in ours.items() if name in names}
    arrays = published("maskgit_transformer_flax.txt")
    assert first == {name: tuple(from_flax(name, array).shape) for name, array in arrays.items()}
    config.grid = [32, 32]
    assert shapes(config)["net.position_embedding"] == (1025, 768)
