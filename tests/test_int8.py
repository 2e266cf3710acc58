"""Products in int8: exact for what int8 holds, near to fp32 for the rest, and the same whatever the
batch."""

import json

import pytest
import torch
from PIL import Image
from test_fast import LABELS, paint, random_model, start
from torch.nn import functional as F

from maskgit import Pipeline
from maskgit.commands.main import main
from maskgit.common import UserError
from maskgit.fast import fast
from maskgit.int8 import LARGEST, WEIGHT, ZERO, check_int8, int8_linear
from maskgit.metadata import from_png


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(5, 48), (2, 5, 48), (0, 48), (1, 0, 48)])
def test_whole_numbers_within_the_range_are_multiplied_exactly(biased, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-LARGEST, LARGEST + 1, shape, generator=generator).float()
    weight = torch.randint(-WEIGHT, WEIGHT + 1, (7, 48), generator=generator).float()
    x[..., 0], weight[:, 0] = LARGEST, WEIGHT  # so that all scales are 1
    bias = torch.randn(7, generator=generator) if biased else None
    torch.testing.assert_close(int8_linear(weight, bias)(x), F.linear(x, weight, bias))


def test_nothing_overflows_where_all_products_are_the_largest():
    x, weight = torch.full((4, 256), 3.0), torch.full((8, 256), 0.5)
    torch.testing.assert_close(int8_linear(weight, None)(x), torch.full((4, 8), 384.0))
    torch.testing.assert_close(int8_linear(weight, None)(-x), torch.full((4, 8), -384.0))
    assert 2 * (LARGEST + ZERO) * WEIGHT < 2**15


def test_it_is_the_product_of_what_was_rounded():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 40), torch.randn(6, 40), torch.randn(6)
    rows, columns = (
        (most := t.abs().amax(1, keepdim=True) / n, (t / most).round())
        for t, n in ((x, LARGEST), (weight, WEIGHT))
    )
    expected = (rows[1] @ columns[1].T) * rows[0] * columns[0].T + bias
    torch.testing.assert_close(int8_linear(weight, bias)(x), expected)


def test_it_answers_in_the_type_it_is_asked_in():
    x, weight, bias = (torch.randn(size).bfloat16() for size in ((9, 40), (6, 40), (6,)))
    product = int8_linear(weight, bias)
    assert torch.equal(product(x), product(x.float()).bfloat16())


def test_zeros_stay_zeros():
    assert int8_linear(torch.zeros(3, 8), None)(torch.zeros(2, 8)).eq(0).all()


@pytest.mark.parametrize("architecture", ["modern", "official"])
@torch.no_grad()
def test_logits_are_near_those_of_fp32(architecture):
    model = random_model(architecture)
    for parameter in model.parameters():
        parameter.mul_(0.3)
    tokens = start(model, "some")
    masked = tokens == model.config.mask_id
    exact, rough = (fast(model, int8)(tokens, LABELS)[masked] for int8 in (False, True))
    error = (rough - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("architecture", ["modern", "official"])
@pytest.mark.parametrize("scale", [0, 2.5])
def test_a_seed_names_an_image_whatever_the_batch(architecture, scale):
    model = random_model(architecture)
    quick, tokens = fast(model, int8=True), start(model, "none")
    together = paint(quick, tokens, scale, "confidence")
    alone = paint(quick, tokens[3:4], scale, "confidence", LABELS[3:4], [10])
    assert torch.equal(alone, together[3:4])


def test_a_pipeline_computes_in_it_and_saves_what_it_had(tmp_path):
    exact = Pipeline.from_pretrained("emoji", "cpu", "fp32")
    pipe = Pipeline.from_pretrained("emoji", "cpu", "int8")
    assert pipe.int8 and not exact.int8
    rough, images = (p.sample(range(8), steps=4, seed=0) for p in (pipe, exact))
    assert 0 < (rough - images).abs().mean() < 0.2
    assert pipe.to("cpu").int8 and torch.equal(pipe.sample(range(8), steps=4, seed=0), rough)
    pipe.save_pretrained(tmp_path / "saved")
    again = Pipeline.from_pretrained(tmp_path / "saved", "cpu", "fp32")
    assert torch.equal(again.sample(range(8), steps=4, seed=0), images)
    assert not pipe.to("cpu", "fp32").int8
    assert torch.equal(pipe.sample(range(8), steps=4, seed=0), images)


def test_the_command_takes_it_and_the_file_says_so(tmp_path):
    out = tmp_path / "one.png"
    words = ["--num", "1", "--steps", "2", "--device", "cpu", "--dtype", "int8", "--out", str(out)]
    assert main(["sample", *words]) == 0
    with Image.open(out) as picture:
        assert json.dumps(from_png(picture)).count('"int8"') == 1


def test_a_compiled_model_is_refused():
    pipe = Pipeline.from_pretrained("emoji", "cpu", "int8")
    pipe.transformer.compile()
    with pytest.raises(UserError, match="compiled"):
        pipe.sample([3], steps=1)


def test_a_gpu_is_refused():
    with pytest.raises(UserError, match="bf16"):
        check_int8(torch.device("cuda"))
