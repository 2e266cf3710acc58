"""What goes wrong in silence elsewhere: heads, activation, padding, length, size, precision."""

import open_clip
import pytest
import torch
from conftest import one_line
from test_clip_model import CLOSE, TEXT, VISION, close, features, inputs, shaken

from clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from maskgit.common import UserError


def small(**options):
    """A CLIP of ours with random weights."""
    image = {"size": [32, 32], "patch": 8, "width": 64, "depth": 2, "heads": 4}
    text = {"merges": 500, "context": 12, "width": 32, "depth": 2, "heads": 4}
    image |= options.pop("image", {})
    text |= options.pop("text", {})
    torch.manual_seed(0)
    return shaken(CLIP(CLIPConfig(24, ImageConfig(**image), TextConfig(**text), **options)))


@pytest.mark.parametrize(
    "other",
    [{"image": {"heads": 8}}, {"text": {"heads": 8}}, {"image": {"activation": "quick_gelu"}}],
)
def test_other_heads_or_activation_load_and_are_wrong(other):
    """Which is why bare weights are refused (test_clip_weights.py): nothing else would tell."""
    right, wrong = small(), small(**other)
    wrong.load_state_dict(right.state_dict())
    pixels, ids = inputs((32, 32), right.config.text.rows)
    gaps = [
        (a - b).abs().max()
        for a, b in zip(features(right, pixels, ids), features(wrong, pixels, ids), strict=True)
    ]
    assert max(gaps) > 100 * CLOSE


def test_padding_changes_nothing():
    model = small()
    _, ids = inputs((32, 32), model.config.text.rows)
    padded = torch.where(ids == 0, model.config.text.rows - 1, ids)
    assert not torch.equal(ids, padded)
    close([model.encode_text(ids)], [model.encode_text(padded)])


def test_captions_that_are_too_long_keep_embeddings_of_their_own():
    model = small()
    texts = [" ".join([word] * 40) for word in ("cat", "dog", "house", "sun")]
    assert model.tokenizer.too_long(texts) == [True] * 4
    ids = model.tokenize(texts)
    assert (ids == model.config.text.rows - 1).any(1).all()  # the end token is there
    distances = torch.cdist(model.encode_text(ids), model.encode_text(ids))
    assert distances[~torch.eye(4, dtype=torch.bool)].min() > 0.01


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (16, 80)])
def test_other_input_sizes(size):
    model = small()
    pixels, _ = inputs(size)
    found = model.encode_image(pixels)
    assert found.shape == (5, 24) and found.isfinite().all()
    table = model.visual.positions((size[0] // 8, size[1] // 8))
    assert table.shape == (1 + size[0] * size[1] // 64, 64)
    assert torch.equal(table[0], model.visual.positional_embedding[0])
    if size == (32, 32):
        assert torch.equal(table, model.visual.positional_embedding)
        return
    # As open_clip stretches them on loading.
    target = open_clip.CLIP(24, {**VISION, "image_size": size}, TEXT)
    state = {"visual.positional_embedding": model.visual.positional_embedding.detach().clone()}
    open_clip.model.resize_pos_embed(state, target)
    assert (state["visual.positional_embedding"] - table).abs().max() < CLOSE


def test_sizes_that_the_patch_does_not_divide_are_refused():
    with pytest.raises(UserError) as error:
        small().encode_image(torch.zeros(1, 3, 36, 32))
    one_line(error, "32x36", "patch, 8")
    with pytest.raises(UserError) as error:
        ImageConfig(size=[36, 36], patch=8)
    one_line(error, "patch=8 does not divide")


def test_bf16_error():
    """In bf16 (8 bits of mantissa) a unit-length feature of these small towers is off by 0.007 at
    most; its direction by a cosine of 0.9999."""
    model = small()
    pixels, ids = inputs((32, 32), model.config.text.rows)
    exact = features(model, pixels, ids)
    for rough, right in zip(features(model.bfloat16(), pixels, ids), exact, strict=True):
        assert rough.dtype == torch.float32
        assert 0 < (rough - right).abs().max() < 0.015
        assert (rough * right).sum(-1).min() > 0.999
