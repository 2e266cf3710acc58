"""The fast path gives the plain path's tokens, whatever the batch, and the plain path's logits."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch

import maskgit.fast as module
from maskgit import MaskGIT, MaskGITConfig, Pipeline, decode, guided
from maskgit.fast import fast, stamp
from maskgit.orders import ORDERS
from maskgit.products import Product
from maskgit.threads import by_threads

GRID, CODES, CLASSES = (4, 6), 32, 5
N = GRID[0] * GRID[1]
LABELS = torch.tensor([3, 0, 3, 1, 4])
SEEDS = [7, 8, 9, 10, 11]


def random_model(architecture, heads=4, **changes):
    """Weights that matter: as they are made, the gates of the modern one are 0."""
    config = MaskGITConfig(
        CODES, CLASSES, GRID, architecture, width=48, depth=3, heads=heads, **changes
    )
    torch.manual_seed(0)
    model = MaskGIT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def start(model, known):
    """Tokens of 5 images: masked all over, or some known, as many in each image or others."""
    config = model.config
    tokens = torch.full((5, config.tokens), config.mask_id)
    for i in range(5):
        tokens[i, : {"none": 0, "some": 7, "other": 3 * i}[known]] = i
    return tokens


def paint(model, tokens, scale, order, labels=LABELS, seeds=SEEDS):
    """The tokens after 6 steps."""
    config = model.config
    place = ORDERS[order](config.grid, seeds)
    function = guided(model, labels, scale, "interval:0.3-0.8" if scale == 1 else "constant")
    return decode(function, tokens, config.mask_id, steps=6, seeds=seeds, order=place)


def assert_equal_tokens(model, known, scale, order, count=5):
    tokens, quick = start(model, known)[:count], fast(model)
    several = tokens, scale, order, LABELS[:count], SEEDS[:count]
    plain = paint(model, *several)
    assert torch.equal(paint(quick, *several), plain)
    assert torch.equal(paint(quick, *several), plain)  # with what is kept by now
    alone = paint(quick, tokens[3:4], scale, order, LABELS[3:4], SEEDS[3:4])
    assert torch.equal(alone, plain[3:4])


@pytest.mark.parametrize("architecture", ["modern", "official"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", [0, 1, 2.5])
@pytest.mark.parametrize("known", ["none", "some", "other"])
def test_tokens_are_those_of_the_plain_path_whatever_the_batch(architecture, known, scale, order):
    assert_equal_tokens(random_model(architecture), known, scale, order)


@pytest.mark.parametrize(
    ("known", "scale", "order"),
    [("none", 0, "confidence"), ("none", 2.5, "halton"), ("other", 2.5, "confidence")],
)
def test_tokens_of_the_bundled_model_are_those_of_the_plain_path(known, scale, order):
    assert_equal_tokens(MaskGIT.from_pretrained("emoji").eval(), known, scale, order)


@pytest.mark.parametrize("architecture", ["modern", "official"])
@pytest.mark.parametrize("heads", [4, 5])  # 5 do not divide the width
@pytest.mark.parametrize("batch", [1, 5])
@torch.no_grad()
def test_logits_are_the_plain_ones_where_tokens_are_masked(architecture, heads, batch):
    model = random_model(architecture, heads).double()
    quick = fast(model)
    tokens = torch.randint(0, CODES + 1, (batch, N)).index_fill(1, torch.tensor([5]), CODES)
    tokens[0, 1:5] = 0
    for some in tokens, tokens.fill_(CODES):
        logits, masked = quick(some, LABELS[:batch]), some == CODES
        assert logits.dtype == torch.float64
        expected = model(some, LABELS[:batch])
        torch.testing.assert_close(logits[masked], expected[masked], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ["modern", "official"])
@pytest.mark.parametrize("known", ["some", "other"])
@torch.no_grad()
def test_parts_that_fit_the_cache_make_one_batch(architecture, known):
    model = random_model(architecture)
    quick, tokens = fast(model), start(model, known)
    sizes, compute = [], type(quick.net).compute

    def counted(net, tokens, condition, at):
        sizes.append(len(tokens))
        return compute(net, tokens, condition, at)

    one = 4 * (N + quick.net.extra) * quick.net.widest
    with patch.object(module, "CACHE", 2 * one + 1), patch.object(quick.net, "compute", None):
        quick.net.compute = counted.__get__(quick.net)
        logits = quick(tokens, LABELS)
    masked = tokens == CODES
    torch.testing.assert_close(logits[masked], model(tokens, LABELS)[masked])
    assert sizes == [2, 2, 1]


@pytest.fixture
def two_threads(threads):
    threads(2)
    with patch.object(module, "threads_apart", torch.get_num_threads):  # on one processor too
        yield


@pytest.mark.parametrize("architecture", ["modern", "official"])
@pytest.mark.parametrize("known", ["some", "other"])
@torch.no_grad()
def test_threads_have_parts_of_their_own_where_there_is_enough(architecture, known, two_threads):
    model = random_model(architecture)
    quick, tokens = fast(model), start(model, known)[:4]
    dealt, one = [], 4 * (N + quick.net.extra) * quick.net.widest

    def seen(function, parts):
        parts = list(parts)
        dealt.append([len(part[0]) for part in parts])
        return by_threads(function, parts)

    with patch.object(module, "ENOUGH", 2 * one), patch.object(module, "by_threads", seen):
        logits = quick(tokens, LABELS[:4])
        with patch.object(module, "CACHE", 2 * one):  # an image for each
            quick(tokens, LABELS[:4])
        quick(tokens[:3], LABELS[:3])  # cannot be dealt out evenly
        quick(tokens[:2], LABELS[:2])  # not enough
        quick(tokens[:0], LABELS[:0])
    assert dealt == [[2, 2], [1, 1, 1, 1]]
    masked = tokens == CODES
    torch.testing.assert_close(logits[masked], model(tokens, LABELS[:4])[masked])


@pytest.mark.parametrize("architecture", ["modern", "official"])
@pytest.mark.parametrize("known", ["none", "some", "other"])
@pytest.mark.parametrize("scale", [0, 1])
def test_tokens_are_the_same_from_threads_of_their_own(architecture, known, scale, two_threads):
    model = random_model(architecture)
    with patch.object(module, "ENOUGH", 1), patch.object(module, "CACHE", 1):
        assert_equal_tokens(model, known, scale, "confidence", 4)


@pytest.mark.parametrize("piece", [1, 48, 100, 10**9])
@torch.no_grad()
def test_pieces_of_a_product_are_the_whole(piece):
    layers = [torch.nn.Linear(20, 48) for _ in range(3)]
    x = torch.randn(2, 5, 20)
    with patch("maskgit.products.PIECE", piece):
        result = Product(*layers)(x, torch.empty(2 * 5 * 3 * 48 + 7))
    torch.testing.assert_close(result, torch.cat([layer(x) for layer in layers], -1))


@pytest.mark.parametrize("architecture", ["modern", "official"])
def test_masks_alone_are_computed_once_a_class(architecture):
    model = random_model(architecture)
    quick, masks = fast(model), torch.full((5, N), CODES)
    expected = model(masks, LABELS)
    torch.testing.assert_close(quick(masks, LABELS), expected)
    assert list(quick.net.first) == [3, 0, 1, 4]
    with patch.object(quick.net, "compute", None):  # nothing is computed any more
        torch.testing.assert_close(quick(masks, LABELS), expected)
    with patch.object(module, "KEPT", 2 * expected[0].nbytes):
        torch.testing.assert_close(
            quick(masks[:2], torch.tensor([2, 3])),
            expected[:1].new_tensor(model(masks[:2], torch.tensor([2, 3])).tolist()),
        )
        assert len(quick.net.first) == 2


@pytest.mark.parametrize("architecture", ["modern", "official"])
def test_it_keeps_the_checks_and_the_forms_of_the_model(architecture):
    quick = fast(random_model(architecture))
    with pytest.raises(Exception, match="takes"):
        quick(torch.zeros(1, N + 1, dtype=torch.long), LABELS[:1])
    tokens = torch.full((2, N), CODES)
    null = torch.tensor([CLASSES] * 2)
    assert torch.equal(quick(tokens), quick(tokens, null))
    assert quick(tokens[:0], null[:0]).shape == (0, N, CODES)
    assert quick(tokens.zero_(), null).shape == (2, N, CODES)  # nothing is asked for


@torch.no_grad()
def test_in_bf16_it_is_as_near_to_fp32_as_the_plain_path():
    exact = MaskGIT.from_pretrained("emoji").eval()
    tokens, labels = start(exact, "some"), LABELS
    masked = tokens == exact.config.mask_id
    expected = exact(tokens, labels)[masked]
    model = MaskGIT.from_pretrained("emoji").eval().bfloat16()
    plain, quick = (
        (f(tokens, labels)[masked] - expected).square().mean().sqrt() for f in (model, fast(model))
    )
    assert 0 < quick < 1.2 * plain


def test_a_stamp_tells_changes(tmp_path):
    model = random_model("modern")
    stamps = [stamp(model)]
    assert stamp(model) == stamps[0]
    torch.nn.init.zeros_(model.net.head_bias)
    stamps.append(stamp(model))
    model.load_state_dict(random_model("modern").state_dict())
    stamps.append(stamp(model))
    stamps.append(stamp(model.bfloat16()))
    assert all(a != b for a, b in pairwise(stamps))


def test_a_pipeline_follows_changes_of_its_transformer():
    pipe = Pipeline.from_pretrained("emoji", device="cpu", dtype="fp32")
    before = pipe.sample([3], steps=2)
    assert pipe.fast() is pipe.fast()
    with torch.no_grad():
        pipe.transformer.net.blocks[0].attention.query.weight.mul_(-1)
    after = pipe.sample([3], steps=2)
    assert not torch.equal(after, before)
    with patch.object(Pipeline, "fast", lambda pipe: pipe.transformer):
        assert torch.equal(pipe.sample([3], steps=2), after)


def test_a_model_of_another_class_is_left_as_it_is():
    class Own(MaskGIT):
        pass

    own = Own(random_model("modern").config)
    assert fast(own) is own


@pytest.mark.slow  # compiling loads the other half of torch
def test_a_compiled_model_is_left_as_it_is():
    model = random_model("modern")
    model.compile()
    assert fast(model) is model
