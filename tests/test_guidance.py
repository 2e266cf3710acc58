"""Classifier-free guidance: its algebra, its shapes, and the passes that it costs."""

import math

import pytest
import torch

from maskgit.common import UserError
from maskgit.decode import decode
from maskgit.guidance import GUIDANCE, guidance_shape, guided
from maskgit.model import MaskGIT, MaskGITConfig

CLASSES, CODES, GRID = 5, 11, (2, 4)


def make_model(has_null_label=True, num_classes=CLASSES):
    torch.manual_seed(0)
    config = MaskGITConfig(
        codebook_size=CODES,
        num_classes=num_classes,
        grid=GRID,
        width=16,
        depth=2,
        heads=2,
        has_null_label=has_null_label,
    )
    model = MaskGIT(config).eval()
    for parameter in model.parameters():  # zero-initialised layers would make all labels equal
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def batches(model):
    """The batch sizes that pass through the model."""
    sizes = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    return sizes


@pytest.fixture
def tokens():
    return torch.randint(CODES + 1, (3, 8), generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 4, 2])


@torch.no_grad()
def test_scale_zero_is_the_plain_model(model, batches, tokens):
    logits = guided(model, LABELS, 0.0)(tokens, 0.5)
    assert batches == [3]
    assert torch.equal(logits, model(tokens, LABELS))


@torch.no_grad()
def test_one_convention(model, batches, tokens):
    cond = model(tokens, LABELS)
    uncond = model(tokens, torch.full_like(LABELS, model.config.null_label))
    assert not torch.allclose(cond, uncond, atol=0.1)
    batches.clear()
    for scale in 0.5, 1.0, 3.0, -1.0:
        logits = guided(model, LABELS, scale)(tokens, 0.5)
        torch.testing.assert_close(logits, cond + scale * (cond - uncond), atol=1e-4, rtol=1e-4)
    assert batches == [6] * 4
    assert LABELS.tolist() == [0, 4, 2]


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "power-cosine", "power-cosine:1"])
def test_schedule_shapes_the_scale(model, tokens, schedule):
    shape = guidance_shape(schedule)
    for r in 0.125, 0.5, 1.0:
        torch.testing.assert_close(
            guided(model, LABELS, 4.0, schedule)(tokens, r),
            guided(model, LABELS, 4.0 * shape(r))(tokens, r),
        )


def test_shapes():
    values = {
        name: [guidance_shape(name)(r) for r in (0.125, 0.5, 1.0)]
        for name in [*GUIDANCE, "power-cosine:1", "interval:0.1-0.2", "interval:0.5-1"]
    }
    assert values == {
        "constant": [1, 1, 1],
        "linear": [0.125, 0.5, 1],
        "power-cosine": pytest.approx(
            [(1 - math.cos(math.pi / 512)) / 2, (1 - math.cos(math.pi / 8)) / 2, 1]
        ),
        "interval": [0, 1, 0],
        "power-cosine:1": pytest.approx([(1 - math.cos(math.pi / 8)) / 2, 0.5, 1]),
        "interval:0.1-0.2": [1, 0, 0],
        "interval:0.5-1": [0, 1, 1],
    }


@torch.no_grad()
def test_no_cost_outside_the_interval(model, batches, tokens):
    function = guided(model, LABELS, 2.0, "interval:0.3-0.6")
    blank = torch.full_like(tokens, model.config.mask_id)
    decode(function, blank, model.config.mask_id, steps=8)
    assert batches == [3, 3, 6, 6, 3, 3, 3, 3]  # r = 3/8 and 4/8 lie inside
    assert torch.equal(function(tokens, 0.2), model(tokens, LABELS))


@torch.no_grad()
def test_no_class_has_nothing_to_guide_to(model, batches, tokens):
    logits = guided(model, None, 2.0)(tokens, 0.5)
    assert batches == [3]
    null = torch.full_like(LABELS, model.config.null_label)
    assert torch.equal(logits, model(tokens, null))
    torch.testing.assert_close(guided(model, null, 2.0)(tokens, 0.5), logits)


@torch.no_grad()
def test_model_without_null_label(tokens):
    model = make_model(has_null_label=False)
    assert torch.equal(guided(model, LABELS)(tokens, 0.5), model(tokens, LABELS))
    with pytest.raises(UserError, match="needs a model trained with classes and label dropout"):
        guided(model, LABELS, 1.5)
    unconditional = make_model(num_classes=0)
    assert torch.equal(guided(unconditional, None)(tokens, 0.5), unconditional(tokens))
    with pytest.raises(UserError, match="use guidance 0"):
        guided(unconditional, None, 1.5)


@pytest.mark.parametrize(
    "schedule, told",
    [
        ("cosntant", "unknown guidance schedule 'cosntant': did you mean 'constant'"),
        ("linear:2", "linear:2.*do not fit"),
        ("interval:a-b", "do not fit"),
        ("interval:0.8-0.3", "do not fit"),
        ("interval:0.1-0.2-0.3", "do not fit"),
    ],
)
def test_bad_schedule(model, schedule, told):
    with pytest.raises(UserError, match=told):
        guided(model, LABELS, 1.0, schedule)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_that_is_no_number(model, scale):
    with pytest.raises(UserError, match="must be a finite number"):
        guided(model, LABELS, scale)
