"""Published transformers: what they compute, the traps of their files, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import one_line
from straight_transformer import halton, halton_weights, layout, official, official_weights

from maskgit.common import UserError
from maskgit.decode import decode
from maskgit.guidance import guided
from maskgit.model import SIZES, MaskGITConfig
from maskgit.weights import PUBLISHED, published

CODES = 1024  # of the official model


def load(arrays, heads=None):
    """Family and model of a file with these arrays."""
    return published({name: torch.from_numpy(array) for name, array in arrays.items()}, heads)


def some(codes, tokens, batch=2, seed=0):
    """Tokens (B, N), about a third of them masked, as ours and where so."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(codes, size=(batch, tokens))
    masked = generator.random(ids.shape) < 0.3
    return torch.from_numpy(np.where(masked, codes, ids)), masked


@torch.no_grad()
def agree(model, tokens, labels, expected):
    """Assert that the model's logits are `expected`, which are not all alike."""
    logits = model(tokens, labels).numpy()
    assert logits.shape == expected.shape and expected.std() > 0.3
    assert np.abs(logits - expected).max() < 1e-4


def official_agrees(arrays, tokens, labels=(0, 999)):
    family, model = load(arrays)
    ids, masked = some(CODES, tokens)
    labels = np.array(labels)
    expected = official(arrays, np.where(masked, -1, ids), labels)
    agree(model, ids, torch.from_numpy(labels), expected)
    return family, model


def halton_agrees(arrays, tokens, codes, heads, labels, given=None):
    family, model = load(arrays, given)
    ids, _ = some(codes, tokens)
    labels = np.array(labels)
    agree(model, ids, torch.from_numpy(labels), halton(arrays, ids.numpy(), labels, heads))
    return family, model


# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize("tokens", [16, 1024])  # the latter of the 512 x 512 file
def test_official(tokens):
    family, model = official_agrees(official_weights(tokens=tokens), tokens)
    assert family == "official MaskGIT" and not model.training
    config = model.config
    assert (config.codebook_size, config.num_classes) == (1024, 1000)
    assert config.grid == [int(tokens**0.5)] * 2 and (config.heads, config.ffn) == (4, None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("width", "heads"), [(48, 4), (46, 3)])  # heads of 15 in 46
def test_halton(width, heads):
    arrays = halton_weights(width, heads)
    family, model = halton_agrees(arrays, 16, 20, heads, [5, 6], given=heads)
    assert family == "Halton-MaskGIT" and not model.training
    config = model.config
    assert (config.codebook_size, config.num_classes, config.null_label) == (20, 6, 6)
    assert config.grid == [4, 4] and (config.heads, config.ffn, config.registers) == (
        heads,
        None,
        1,
    )


def test_other_sizes_follow_from_the_shapes():
    arrays = halton_weights()
    generator = np.random.default_rng(1)
    for name, array in arrays.items():
        if ".ff." in name:
            shape = [40 if side == 256 else side for side in array.shape]
            arrays[name] = generator.standard_normal(shape).astype(np.float32) / 8
    arrays["reg_tokens.weight"] = generator.standard_normal((3, 48)).astype(np.float32)
    _, model = halton_agrees(arrays, 16, 20, 4, [0, 1], given=4)
    assert (model.config.ffn, model.config.registers) == (40, 3)


@pytest.mark.slow
def test_official_at_full_width():
    arrays = official_weights(768, 16, 24, 256)
    assert len(arrays) == 393
    _, model = official_agrees(arrays, 256)
    size = MaskGITConfig(1024, 1000, [16, 16], **SIZES["official"], has_null_label=False)
    assert model.config == size


@pytest.mark.slow
def test_halton_small_at_full_width():
    arrays = halton_weights(512, 6, 12, 256, codes=16384, classes=1000)
    assert arrays["transformer.layers.11.attn.wq.weight"].shape == (510, 512)
    family, model = halton_agrees(arrays, 256, 16384, 6, [999, 1000])
    assert family == "Halton-MaskGIT small"
    assert model.config == MaskGITConfig(16384, 1000, [16, 16], **SIZES["halton-small"])


@pytest.mark.parametrize(
    ("file", "depth", "sizes", "heads", "hidden", "side"),
    [
        ("halton_transformer.txt", 12, {256: 576}, 12, 2048, 24),  # base
        (
            "halton_transformer.txt",
            24,
            {768: 1024, 4608: 6144, 1536: 2048, 2048: 2816, 256: 576},
            16,
            2816,
            24,
        ),
        ("maskgit_transformer_flax.txt", 24, {257: 1025}, 16, 3072, 32),
    ],
)
def test_published_files_by_their_names_and_shapes(file, depth, sizes, heads, hidden, side):
    """At full size, without numbers."""
    shapes = layout(file, depth, sizes)
    shapes.pop("head.weight", None)  # the tied one: there are no numbers to compare
    model = published({n: torch.empty(shape, device="meta") for n, shape in shapes.items()})[1]
    config = model.config
    assert (config.depth, config.heads, config.hidden, config.ffn) == (depth, heads, hidden, None)
    assert config.grid == [side, side] and config.num_classes == 1000
    assert config.codebook_size == (1024 if "flax" in file else 16384)
    assert config.has_null_label == ("flax" not in file)


def test_the_published_sizes_have_their_heads():
    sizes = {(384, 6, 384): ("tiny", 6), (512, 12, 510): ("small", 6), (768, 12, 768): ("base", 12)}
    assert sizes | {(1024, 24, 1024): ("large", 16)} == PUBLISHED
    family, model = load(halton_weights(384, 6, 6))
    assert family == "Halton-MaskGIT tiny"
    assert model.config == MaskGITConfig(20, 6, [4, 4], **SIZES["halton-tiny"])


def test_half_precision_and_a_tree_without_its_root():
    arrays = official_weights()
    halved = {
        name.removeprefix("params/"): torch.from_numpy(a).half() for name, a in arrays.items()
    }
    _, model = published(halved)
    ids, masked = some(CODES, 16)
    rounded = {name: a.numpy() for name, a in halved.items()}
    expected = official(rounded, np.where(masked, -1, ids), np.array([1, 2]))
    agree(model, ids, torch.tensor([1, 2]), expected)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ---------------------------------------------------------------- traps of the official files


@pytest.fixture(scope="module")
def arrays():
    return official_weights()


@torch.no_grad()
def logits(arrays, tokens, labels):
    return load(arrays)[1](tokens, torch.tensor(labels))


def with_row(arrays, name, row, value):
    """The arrays with another row in one of them."""
    array = arrays[name].copy()
    array[row] = value
    return arrays | {name: array}


TABLE = "params/Embed_0/word_embeddings/embedding"
KEY = "params/TransformerLayer_1/Attention_0/self_attention/key/kernel"
QUERY = "params/TransformerLayer_0/Attention_0/self_attention/query/kernel"
UP = "params/TransformerLayer_0/Mlp_0/intermediate_output/kernel"


def test_labels_are_ids_behind_the_codes(arrays):
    tokens, _ = some(CODES, 16)
    before = logits(arrays, tokens, [3, 4])
    after = logits(with_row(arrays, TABLE, CODES + 3, 1.0), tokens, [3, 4])
    assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])


def test_the_mask_is_the_last_row_and_not_the_first_class(arrays):
    tokens = torch.arange(32).view(2, 16)
    tokens[1, 5] = CODES  # as we have it; -1 in the released code
    before = logits(arrays, tokens, [7, 7])
    assert torch.equal(before, logits(with_row(arrays, TABLE, CODES, 1.0), tokens, [7, 7]))
    after = logits(with_row(arrays, TABLE, 2024, 1.0), tokens, [7, 7])
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_there_is_no_null_label_and_no_guidance(arrays):
    _, model = load(arrays)
    tokens, labels = some(CODES, 16)[0], torch.tensor([0, 999])
    assert model.config.null_label is None and model.config.label_rows == 1000
    with pytest.raises(UserError) as error:
        guided(model, labels, 1.0)
    one_line(error, "label dropout", "use guidance 0")
    with pytest.raises(UserError, match="give it a class"):
        model(tokens)
    with pytest.raises(IndexError):  # number 1000 would be the mask's row
        model(tokens, torch.tensor([0, 1000]))


def test_logits_are_cut_to_the_codebook(arrays):
    tokens, _ = some(CODES, 16)
    name = "params/MlmLayer_0/mlm_bias/bias"
    loud = with_row(arrays, name, slice(CODES, None), 1e4)
    assert torch.equal(logits(arrays, tokens, [0, 1]), logits(loud, tokens, [0, 1]))
    _, model = load(loud)
    blank = torch.full((2, 16), CODES)
    drawn = decode(guided(model, torch.tensor([0, 1])), blank, CODES, steps=2, seeds=[0, 1])
    assert drawn.max() < CODES


def test_the_norms_epsilon():
    """1e-6, the usual one, shows where embeddings vary little."""
    arrays = official_weights()
    for name in arrays:
        if "_embeddings/" in name:
            arrays[name] = arrays[name] * np.float32(0.02)
        elif "mlm_bias" in name:
            arrays[name] = arrays[name] * 3  # or logits would be all alike
    _, model = official_agrees(arrays, 16)
    for norm in model.modules():
        if isinstance(norm, torch.nn.LayerNorm):
            norm.eps = 1e-6
    ids, masked = some(CODES, 16)
    expected = official(arrays, np.where(masked, -1, ids), np.array([0, 999]))
    with pytest.raises(AssertionError):
        agree(model, ids, torch.tensor([0, 999]), expected)


# ---------------------------------------------------------------- traps of Halton's files


def test_the_mask_s_class_is_never_drawn():
    arrays = halton_weights()
    arrays["head.bias"] = arrays["head.bias"].copy()
    arrays["head.bias"][-1] = 1e4
    _, model = load(arrays, heads=4)
    blank, labels = torch.full((3, 16), 20), torch.tensor([0, 1, 6])
    for scale in (0.0, 1.0):
        drawn = decode(guided(model, labels, scale), blank, 20, steps=3, seeds=[0, 1, 2])
        assert drawn.max() < 20


def test_the_head_is_tied():
    arrays = halton_weights()
    both = load(arrays, heads=4)[1].state_dict()
    del arrays["head.weight"]  # as safetensors leave out what is there twice
    once = load(arrays, heads=4)[1].state_dict()
    assert all(torch.equal(both[name], tensor) for name, tensor in once.items())
    arrays["head.weight"] = arrays["tok_emb.weight"] + np.float32(1e-3)
    with pytest.raises(UserError) as error:
        load(arrays, heads=4)
    one_line(error, "head.weight is not tok_emb.weight", "another network")


def test_heads_are_asked_for_where_nothing_tells_them():
    with pytest.raises(UserError) as error:
        load(halton_weights())
    one_line(error, "48 x 2", "384 x 6, 512 x 12, 768 x 12, 1024 x 24", "give --heads N")
    with pytest.raises(UserError) as error:  # 46 over 4 is 44
        load(halton_weights(46, 3), heads=4)
    one_line(error, "4 heads of a width of 46", "44", "45")
    for arrays, heads in ((official_weights(), 4), (halton_weights(384, 6, 6), 6)):
        with pytest.raises(UserError) as error:
            load(arrays, heads=8)
        one_line(error, f"it has {heads} heads, not 8: leave --heads out")
    family, model = load(halton_weights(384, 7, 6), heads=7)  # queries of 378: another network
    assert family == "Halton-MaskGIT" and model.config.heads == 7
