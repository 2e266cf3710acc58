"""The transformer: it computes what the published one does, and nothing in it is idle."""

import json

import pytest
import torch
from test_model_structure import HALTON

from maskgit.common import UserError
from maskgit.model import SIZES, MaskGIT, MaskGITConfig

ARCHITECTURES = ["modern", "official"]


def tiny(architecture: str = "modern", **changes) -> MaskGIT:
    """A small model with every parameter random, as after training: no gate is closed."""
    fields = dict(codebook_size=12, num_classes=3, grid=[3, 5], dropout=0.0) | SIZES["tiny"]
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(**fields | {"architecture": architecture} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tokens_for(model: MaskGIT, batch: int = 2) -> torch.Tensor:
    config = model.config
    ids = torch.arange(batch * config.tokens).view(batch, config.tokens)
    return ids * 7 % (config.codebook_size + 1)  # the mask among them


# The same networks once more, in plain formulas over the published names.


def attention(q, k, v, heads):
    """(B, N, heads * d) each, head by head."""
    d = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        s = slice(h * d, (h + 1) * d)
        score = q[..., s] @ k[..., s].transpose(1, 2) / d**0.5
        parts.append(score.exp() / score.exp().sum(-1, keepdim=True) @ v[..., s])
    return torch.cat(parts, -1)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def silu(x):
    return x * torch.sigmoid(x)


def halton_forward(w, tokens, labels, heads):
    x = w["tok_emb.weight"][tokens] + w["pos_emb.weight"]
    x = torch.cat([x, w["reg_tokens.weight"].expand(len(x), -1, -1)], 1)
    c = silu(w["cls_emb.weight"][labels])
    layer = {n.removeprefix("transformer.layers.0."): p for n, p in w.items() if "layers" in n}
    m = c @ layer["mlp.1.weight"].T + layer["mlp.1.bias"]
    shift1, scale1, gate1, shift2, scale2, gate2 = m[:, None].chunk(6, -1)
    y = rms(x) * layer["ln1.weight"] * (1 + scale1) + shift1
    q, k, v = (y @ layer[f"attn.w{name}.weight"].T for name in "qkv")
    x = x + gate1 * (attention(rms(q), rms(k), v, heads) @ layer["attn.wo.weight"].T)
    y = rms(x) * layer["ln2.weight"] * (1 + scale2) + shift2
    y = silu(y @ layer["ff.w1.weight"].T) * (y @ layer["ff.w3.weight"].T)
    x = (x + gate2 * (y @ layer["ff.w2.weight"].T))[:, : tokens.shape[1]]
    m = c @ w["last_norm.mlp.1.weight"].T + w["last_norm.mlp.1.bias"]
    shift, scale = m[:, None].chunk(2, -1)
    x = rms(x) * w["last_norm.norm_final.weight"] + w["last_norm.norm_final.bias"]
    return ((x * (1 + scale) + shift) @ w["tok_emb.weight"].T + w["head.bias"])[..., :-1]


def test_modern_computes_what_the_published_network_does():
    model = tiny("modern", depth=1, width=46, heads=3, registers=2)  # heads of 15
    weights = {HALTON[name]: p for name, p in model.named_parameters()}
    tokens, labels = tokens_for(model), torch.tensor([2, 3])
    expected = halton_forward(weights, tokens, labels, heads=3)
    torch.testing.assert_close(model(tokens, labels), expected, atol=1e-4, rtol=1e-4)


def official_forward(w, tokens, labels, codes, heads):
    table = w["net.token_embedding.weight"]
    ids = torch.cat([codes + labels[:, None], torch.where(tokens == codes, -1, tokens)], 1)
    x = table[ids] + w["net.position_embedding"]
    x = layer_norm(x, w["net.embedding_norm.weight"], w["net.embedding_norm.bias"])
    w = {n.removeprefix("net.").removeprefix("blocks.0."): p for n, p in w.items()}
    q, k, v = (
        x @ w[f"attention.{n}.weight"].T + w[f"attention.{n}.bias"]
        for n in ("query", "key", "value")
    )
    y = attention(q, k, v, heads) @ w["attention.out.weight"].T + w["attention.out.bias"]
    x = layer_norm(x + y, w["norm1.weight"], w["norm1.bias"])
    y = gelu(x @ w["up.weight"].T + w["up.bias"]) @ w["down.weight"].T + w["down.bias"]
    x = layer_norm(x + y, w["norm2.weight"], w["norm2.bias"])
    x = gelu(x @ w["head.weight"].T + w["head.bias"])
    x = layer_norm(x, w["head_norm.weight"], w["head_norm.bias"])
    return (x @ table.T + w["head_bias"])[:, 1:, :codes]


@pytest.mark.parametrize("has_null_label", [True, False])
def test_official_computes_what_the_published_network_does(has_null_label):
    model = tiny("official", depth=1, has_null_label=has_null_label)
    tokens, labels = tokens_for(model), torch.tensor([0, 3 if has_null_label else 2])
    expected = official_forward(dict(model.named_parameters()), tokens, labels, 12, heads=4)
    torch.testing.assert_close(model(tokens, labels), expected, atol=1e-4, rtol=1e-4)


# What both owe their callers.


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_gets_a_gradient(architecture, num_classes):
    model = tiny(architecture, num_classes=num_classes, dropout=0.1).train()
    logits = model(tokens_for(model), torch.tensor([0, 2]))
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("key.bias"):  # adds the same to all scores, so softmax drops it
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_cover_the_codebook_and_never_the_mask(architecture):
    model = tiny(architecture)
    tokens, labels = tokens_for(model), torch.tensor([0, 1])
    before = model(tokens, labels)
    assert before.shape == (2, 15, 12)
    assert before.dtype == torch.float32
    with torch.no_grad():
        model.net.head_bias[12:] = 100.0  # the mask's, and in the official network the labels'
    assert torch.equal(model(tokens, labels), before)
    assert model.bfloat16()(tokens, labels).dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_grid_is_checked_and_need_not_be_square(architecture):
    model = tiny(architecture, grid=(2, 7))
    assert (model.config.grid, model.config.tokens, model.config.mask_id) == ([2, 7], 14, 12)
    assert model(tokens_for(model), torch.tensor([0, 1])).shape == (2, 14, 12)
    with pytest.raises(UserError, match="2 x 7"):
        model(torch.zeros(2, 15, dtype=torch.int64), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="2 x 7"):
        model(torch.zeros(2, 2, 7, dtype=torch.int64), torch.tensor([0, 1]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_label_means_the_null_label(architecture):
    model = tiny(architecture)
    tokens = tokens_for(model)
    assert model.config.null_label == 3
    null = model(tokens, torch.tensor([3, 3]))
    assert torch.equal(model(tokens), null)
    assert not torch.allclose(model(tokens, torch.tensor([0, 3]))[0], null[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_label_dropout_a_label_is_needed(architecture):
    model = tiny(architecture, has_null_label=False)
    tokens = tokens_for(model)
    assert model.config.null_label is None
    with pytest.raises(UserError, match="give it a class"):
        model(tokens)
    with pytest.raises(IndexError):  # and is no id of the mask
        model(tokens, torch.tensor([0, 3]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unconditional_model_ignores_labels(architecture):
    model = tiny(architecture, num_classes=0)
    tokens = tokens_for(model)
    assert model.config.null_label is None
    assert torch.equal(model(tokens), model(tokens, torch.tensor([-1, 5])))


def test_official_keeps_the_null_label_and_the_mask_apart():
    model = tiny("official")
    table = model.net.token_embedding.weight
    assert len(table) == 12 + 3 + 1 + 1
    known = tokens_for(model) % 12
    before = model(known)
    with torch.no_grad():
        table[-1] = torch.randn(64)
    assert torch.equal(model(known), before)
    with torch.no_grad():
        table[-2] = torch.randn(64)
    assert not torch.allclose(model(known), before)


def test_modern_blocks_begin_as_the_identity():
    model = MaskGIT(MaskGITConfig(12, 3, [3, 5], **SIZES["tiny"], dropout=0.0))
    x = torch.randn(2, 15, 64)
    for block in model.net.blocks:
        assert torch.equal(block(x, torch.randn(2, 1, 64)), x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_begin_small_and_biases_at_zero(architecture):
    fields = SIZES["tiny"] | {"architecture": architecture}
    model = MaskGIT(MaskGITConfig(512, 64, [8, 8], **fields))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "embedding" in name and parameter.ndim == 2:
            assert 0.016 < parameter.std() < 0.022, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_and_loaded_model_is_the_same(architecture, tmp_path):
    model = tiny(architecture, ffn=32)
    tokens, labels = tokens_for(model), torch.tensor([0, 1])
    expected = model(tokens, labels)

    model.save_pretrained(tmp_path / "full")
    loaded = MaskGIT.from_pretrained(tmp_path / "full")
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens, labels), expected)

    model.save_pretrained(tmp_path / "pipeline" / "transformer", half=True)
    loaded = MaskGIT.from_pretrained(tmp_path / "pipeline")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(tokens, labels), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "modem"}, "did you mean 'modern'"),
        ({"heads": 0}, "heads=0"),
        ({"codebook_size": 13}, "do not fit MaskGIT"),
        ({"colour": "red"}, "no field 'colour'"),
    ],
)
def test_foreign_config_is_told_in_one_line(change, message, tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        MaskGIT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
