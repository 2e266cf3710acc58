"""The tokenizer's network: the published layouts, written as configurations, and what it does."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from maskgit.common import UserError
from vqgan import VQGAN, VQGANConfig
from vqgan.model import Attention, Down, Encoder, ResBlock
from vqgan.quantizer import QuantizerConfig

KEYS = Path(__file__).parent / "keys"  # names and shapes of the published weights


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


MASKGIT = VQGANConfig()
TAMING = VQGANConfig(
    decoder_blocks=3,
    attention=[4],
    middle_attention=True,
    down="conv",
    shortcut="input",
    biasless=False,
    out_kernel=3,
    quant_conv=True,
    signed=True,
    quantizer=QuantizerConfig(codebook_size=16384, dim=256),
)
LLAMAGEN = QuantizerConfig(codebook_size=16384, dim=8, normalize=True)
LLAMAGEN_16 = VQGANConfig(**{**vars(TAMING), "quantizer": LLAMAGEN})
LLAMAGEN_8 = VQGANConfig(**{**vars(LLAMAGEN_16), "mult": [1, 2, 2, 4], "attention": [3]})


def tiny(**changes):
    """A network of the same kind, in 8 channels, as freshly made."""
    fields = {"channels": 8, "mult": [1, 1, 2], "z_channels": 6, "groups": 4}
    codes = QuantizerConfig(codebook_size=32, dim=changes.pop("dim", 6))
    return VQGAN(VQGANConfig(**{**fields, "quantizer": codes, **changes}))


def like(config, **changes):
    """`tiny`, with the features of a published configuration."""
    names = ("down", "shortcut", "biasless", "out_kernel", "quant_conv", "signed")
    features = {name: getattr(config, name) for name in (*names, "middle_attention")}
    return tiny(**{**features, "attention": [2] if config.attention else [], **changes})


def layer_names(config, side):
    """The layers of the encoder or decoder in order, as taming-transformers' checkpoints say."""
    attends = ["mid.attn_1"] if config.middle_attention else []
    middle = ["mid.block_1", *attends, "mid.block_2"]
    levels, names = range(len(config.mult)), []
    way, blocks = "down", config.encoder_blocks
    if side == "decoder":
        levels, way, blocks = reversed(levels), "up", config.decoder_blocks
    for level in levels:
        for i in range(blocks):
            names.append(f"{way}.{level}.block.{i}")
            if level in config.attention:
                names.append(f"{way}.{level}.attn.{i}")
        if level != (len(config.mult) - 1 if side == "encoder" else 0):
            names.append(f"{way}.{level}.{way}sample")
    return names + middle if side == "encoder" else middle + names


def taming_shapes(config):
    """Shape of every parameter at full width, under taming's names."""
    with torch.device("meta"):
        model = VQGAN(config)
    shapes = {}
    for name, parameter in model.named_parameters():
        side, _, rest = name.partition(".layers.")
        if rest:
            index, _, leaf = rest.partition(".")
            leaf = leaf.replace("shortcut.", "nin_shortcut.").replace("out.", "proj_out.")
            name = f"{side}.{layer_names(config, side)[int(index)]}.{leaf}"
        name = name.replace("quantizer.codebook", "quantize.embedding.weight")
        shapes[name] = tuple(parameter.shape)
    return shapes


# From taming's names to those of the others: (pattern, replacement), in order.
PORT = [
    (r"mid\.block_1", "mid.0"),
    (r"mid\.block_2", "mid.1"),
    (r"upsample\.conv", "upsample_conv"),
]
LLAMAGEN_16_NAMES = [
    (r"mid\.block_1", "mid.0"),
    (r"mid\.attn_1", "mid.1"),
    (r"mid\.block_2", "mid.2"),
    (r"\.(\d)\.block\.", r".\1.res."),
    (r"down\.", "conv_blocks."),
    (r"up\.(\d)", lambda m: f"conv_blocks.{4 - int(m[1])}"),  # from the lowest resolution up
]
LLAMAGEN_8_NAMES = [
    *LLAMAGEN_16_NAMES[:-1],
    (r"up\.(\d)", lambda m: f"conv_blocks.{3 - int(m[1])}"),
]


def own_shapes(config, renaming):
    shapes = {}
    for name, shape in taming_shapes(config).items():
        for pattern, replacement in renaming:
            name = re.sub(pattern, replacement, name)
        shapes[name] = shape
    return shapes


def numbers(shape):
    return tuple(int(s) for s in shape.split(",") if s.strip())


def published_shapes(file):
    lines = (KEYS / file).read_text().splitlines()
    found = (re.fullmatch(r"(\S+) \((.*)\)", line).groups() for line in lines)
    return {name: numbers(shape) for name, shape in found}


@pytest.mark.parametrize(
    ("config", "file", "renaming"),
    [
        (TAMING, "taming_f16_16384.txt", []),
        (MASKGIT, "maskgit_port.txt", PORT),
        (LLAMAGEN_16, "llamagen_vq16.txt", LLAMAGEN_16_NAMES),
        (LLAMAGEN_8, "llamagen_vq8.txt", LLAMAGEN_8_NAMES),
    ],
    ids=["taming", "maskgit-port", "llamagen-16", "llamagen-8"],
)
def test_configurations_express_the_published_layouts(config, file, renaming):
    published = published_shapes(file)
    published.pop("quantize.codebook_used", None)  # a training statistic
    assert own_shapes(config, renaming) == published


def test_the_official_flax_arrays_fit_too():
    """(3, 3, in, out) kernels there; the codebook as it is."""
    own = own_shapes(MASKGIT, PORT)
    fitted = {}
    for line in (KEYS / "maskgit_flax_to_port.txt").read_text().splitlines():
        flax, shape, name = re.fullmatch(r"(\S+) \((.*?)\) -> (\S+) .*", line).groups()
        shape = numbers(shape)
        fitted[name] = tuple(shape[i] for i in (3, 2, 0, 1)) if flax.endswith("kernel") else shape
    assert own == fitted


def test_factors():
    assert [c.factor for c in (TAMING, MASKGIT, LLAMAGEN_16, LLAMAGEN_8)] == [16, 16, 16, 8]
    assert TAMING.codebook_size == 16384


KINDS = [TAMING, MASKGIT, LLAMAGEN_16]
IDS = ["taming", "maskgit", "llamagen"]


@pytest.mark.parametrize("size", [(4, 4), (12, 20), (28, 4)])
@pytest.mark.parametrize("config", KINDS, ids=IDS)
def test_any_multiple_of_the_factor_is_encoded_and_decoded(config, size):
    model = like(config).eval()
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        tokens = model.encode(images)
        assert tokens.dtype == torch.int64 and tokens.shape == (2, size[0] // 4, size[1] // 4)
        assert tokens.min() >= 0 and tokens.max() < 32
        model.decoder.conv_out.weight *= 100  # far outside the range
        decoded = model.decode(tokens)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert decoded.min() == 0 and decoded.max() == 1


def test_other_sizes_are_told():
    with pytest.raises(UserError, match=r"multiples of 4, not 10x12"):
        tiny().encode(torch.rand(1, 3, 10, 12))


@pytest.mark.parametrize("config", KINDS, ids=IDS)
def test_every_parameter_gets_a_gradient(config):
    model = like(config)
    images = torch.rand(2, 3, 16, 16)
    fake, _, _, loss = model(images)
    (F.mse_loss(fake, images) + loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Softmax ignores what is added to all keys alike, so their bias has nothing to learn.
        assert parameter.grad.any() or name.endswith("k.bias"), name


def test_forward_is_the_three_stages_and_can_leave_the_bottleneck_out():
    model, images = like(LLAMAGEN_16, dim=3).eval(), torch.rand(2, 3, 8, 12)
    fake, rows, tokens, loss = model(images)
    assert torch.equal(tokens, model.encode(images)) and loss > 0
    assert torch.allclose(fake.clamp(0, 1), model.decode(tokens), atol=1e-5)
    assert torch.equal(rows, model.quantizer.flatten(model.latents(images)))
    fake, _, tokens, loss = model(images, quantize=False)
    assert torch.allclose(fake, model.render(model.latents(images))) and not tokens.numel()
    assert loss.item() == 0


def test_range_of_the_network_is_inside():
    signed, unsigned = tiny(signed=True), tiny(signed=False)
    unsigned.load_state_dict(signed.state_dict())
    images, z = torch.rand(1, 3, 8, 8), torch.randn(1, 6, 2, 2)
    assert torch.allclose(signed.latents(images), unsigned.latents(images * 2 - 1), atol=1e-6)
    assert torch.allclose(signed.render(z) * 2 - 1, unsigned.render(z), atol=1e-6)


@pytest.mark.parametrize("size", [(6, 10), (7, 5)])
def test_strided_downsampling_pads_right_and_below(size):
    config = tiny(down="conv").config
    down, x = Down(config, 8), torch.randn(1, 8, *size)
    padded = torch.zeros(1, 8, size[0] + 1, size[1] + 1)
    padded[..., :-1, :-1] = x
    assert torch.allclose(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))
    assert down(x).shape[2:] == (size[0] // 2, size[1] // 2)


def test_pooled_downsampling_is_a_mean():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert Down(tiny().config, 1)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def swish(x):
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("shortcut", ["input", "output"])
def test_shortcuts(shortcut):
    """MaskGIT's takes the block's own output where the width changes; the input is dropped."""
    config = tiny(shortcut=shortcut, biasless=False).config
    block, x = ResBlock(config, 8, 16), torch.randn(2, 8, 4, 4)
    h = block.conv1(swish(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = block.conv2(swish(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-6)))
    expected = h + block.shortcut(x if shortcut == "input" else h)
    assert torch.allclose(block(x), expected, atol=1e-5)
    assert not hasattr(ResBlock(config, 8, 8), "shortcut")


def test_the_epsilon_reaches_every_norm():
    norms = [m for m in like(TAMING, eps=0.5).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms and {m.eps for m in norms} == {0.5}
    assert {m.num_groups for m in norms} == {4}


def test_attention_is_one_head_over_all_positions():
    attention, x = Attention(tiny().config, 8), torch.randn(2, 8, 3, 5)
    n = attention.norm(x)
    q, k, v = (f(n).flatten(2) for f in (attention.q, attention.k, attention.v))  # (B, C, N)
    weights = torch.softmax(q.mT @ k / 8**0.5, dim=2)  # (B, N queries, N keys)
    expected = x + attention.out((v @ weights.mT).view_as(x))
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_attention_stands_where_the_configuration_says():
    """By level, whatever the size of the picture: one more for each block of that level."""
    config = tiny(attention=[1], encoder_blocks=3, middle_attention=True).config
    kinds = [type(layer).__name__[0] for layer in Encoder(config).layers]
    assert "".join(kinds) == "RRRD" + "RARARAD" + "RRR" + "RAR"


def test_pretrained_round_trip(tmp_path):
    model = like(LLAMAGEN_16, dim=3).eval()
    images = torch.rand(1, 3, 8, 8)
    model.save_pretrained(tmp_path / "vqgan")
    for folder in (tmp_path / "vqgan", tmp_path):  # its own, or the pipeline's around it
        loaded = VQGAN.from_pretrained(folder)
        assert loaded.config == model.config and not loaded.training
        tokens = loaded.encode(images)
        assert torch.equal(tokens, model.encode(images))
        assert torch.equal(loaded.decode(tokens), model.decode(tokens))
    model.save_pretrained(tmp_path / "half", half=True)
    half = VQGAN.from_pretrained(tmp_path / "half")
    assert half.encoder.conv_in.weight.dtype == torch.float32
    assert torch.allclose(half.decode(tokens), model.decode(tokens), atol=2e-2)


@pytest.mark.parametrize(
    "changes",
    [{"down": "convolution"}, {"shortcut": "none"}, {"dim": 5}],
)
def test_a_configuration_that_cannot_be_is_told(changes):
    with pytest.raises(UserError):
        tiny(**changes)
