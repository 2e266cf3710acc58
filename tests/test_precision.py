"""A model that computes in float64 does so from end to end, and no less than fp32 is ever used.

A cast to fp32 anywhere would make a staircase of steps of 1e-7, on which finite differences of
1e-6, as gradcheck takes them, are off by a tenth.
"""

import pytest
import torch
from tiny_clip import tiny_clip
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from maskgit.common.precision import widen
from maskgit.common.vary import VaryConfig, vary
from maskgit.evaluation.classifier import Classifier, ClassifierConfig
from maskgit.model import SIZES, MaskGIT, MaskGITConfig
from vqgan import VQGAN, VQGANConfig
from vqgan.codebook import CodebookAverage, entropy_loss, kmeans
from vqgan.quantizer import Quantizer, QuantizerConfig

KINDS = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.uint8: torch.float32,
    torch.int64: torch.float32,
}


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def is_smooth(f, x: Tensor) -> bool:
    """Whether `f` of a float64 tensor is float64, and its gradient the limit of its differences."""
    x = x.detach().clone().requires_grad_()
    assert f(x).dtype == torch.float64
    return gradcheck(f, x, fast_mode=True)


def double(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.numel() == 1 or parameter.std() == 0:  # gates of 0 would hide what they gate
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.mark.parametrize(("given", "expected"), KINDS.items())
def test_widened_is_fp32_or_what_is_wider(given, expected):
    x = torch.tensor([0, 1, 200], dtype=given)
    assert widen(x).dtype == expected and widen(x).tolist() == [0, 1, 200]
    assert (widen(x) is x) == (given == expected)


def test_a_cast_on_the_way_would_be_found():
    def cast(x):
        return x.sin().float().double()

    assert is_smooth(torch.sin, random(5))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        is_smooth(cast, random(5))


@pytest.mark.parametrize("architecture", ["modern", "official"])
def test_maskgit(architecture):
    shape = {**SIZES["tiny"], "architecture": architecture, "width": 16, "heads": 2}
    model = double(MaskGIT(MaskGITConfig(8, 3, [2, 3], **shape)))
    tokens, labels = torch.arange(12).view(2, 6) % 9, torch.tensor([0, 3])
    for name in ("net.position_embedding", "net.token_embedding.weight"):

        def logits(x, name=name):
            return functional_call(model, {name: x}, (tokens, labels))

        assert is_smooth(logits, model.state_dict()[name])


VQ = VQGANConfig(
    8, [1, 2], 1, 1, 8, [1], True, groups=4, quant_conv=True, quantizer=QuantizerConfig(16, 4)
)


def test_vqgan():
    model, images = double(VQGAN(VQ)), random(2, 3, 8, 8)
    assert is_smooth(model.latents, images)
    assert is_smooth(model.render, random(2, 4, 4, 4))
    fake, rows, tokens, loss = model(images)
    assert {fake.dtype, rows.dtype, loss.dtype} == {torch.float64}
    assert model.decode(tokens).dtype == torch.float64
    # The straight-through gradient is no limit of differences, but has all its digits.
    fake.square().sum().backward()
    exact = model.encoder.conv_in.weight.grad
    assert exact.dtype == torch.float64 and not torch.equal(exact, exact.float().double())


@pytest.mark.parametrize("normalize", [False, True])
def test_the_quantizer_tells_codes_apart_that_fp32_cannot(normalize):
    quantizer = Quantizer(QuantizerConfig(3, 4, normalize)).double()
    z = torch.nn.functional.normalize(random(1, 4, 5, 1), dim=1)
    with torch.no_grad():
        quantizer.codebook.copy_(z[0, :, 2, 0] + 1e-7 * torch.tensor([1.0, -1.0, 0.0])[:, None])
        quantizer.codebook[:, 0] += 1e-7 * torch.tensor([1.0, -1.0, 0.0])
    assert quantizer.lookup(z)[0, 2, 0] == 2
    code, tokens, loss = quantizer(z, beta=0.25)
    gap = z - quantizer.codes()[tokens].permute(0, 3, 1, 2)
    assert code.dtype == torch.float64
    assert loss.item() == pytest.approx(1.25 * gap.square().mean().item(), rel=1e-13)


def test_codebook_averages_have_the_precision_of_the_codebook():
    codebook, rows = random(4, 3), random(40, 3) - 0.5
    average = CodebookAverage(codebook, decay=0.9, pool=8)
    assert {b.dtype for b in average.buffers()} == {torch.float64}
    assert {b.dtype for b in CodebookAverage(codebook.float(), pool=8).buffers()} == {torch.float32}
    assert CodebookAverage(codebook.bfloat16()).total.dtype == torch.float32

    ids = torch.arange(40) % 4
    count = 0.9 * torch.ones(4, dtype=torch.float64) + 0.1 * 10
    total = 0.9 * codebook + 0.1 * torch.stack([rows[i::4].sum(0) for i in range(4)])
    average.update(codebook, rows, ids)
    assert torch.allclose(codebook, total / count[:, None], rtol=0, atol=1e-15)
    average.restart(codebook, rows)
    average.collect(rows)
    assert torch.equal(average.pool, rows[-8:])

    centres, sizes = kmeans(rows, 4)
    nearest = torch.cdist(rows, centres).argmin(1)
    means = torch.stack([rows[nearest == i].mean(0) for i in range(4)])
    assert centres.dtype == sizes.dtype == torch.float64
    assert torch.allclose(kmeans(rows, 1)[0], rows.mean(0), rtol=0, atol=1e-15)
    assert (centres - means).abs().max() < 0.2  # of ten rounds; the digits are those of the mean
    assert is_smooth(lambda rows: entropy_loss(rows, centres, 0.5), rows)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_clip(loss):
    model = double(tiny_clip(loss=loss))
    size = model.config.image.size
    images = random(2, 3, *size)

    def features(images):
        return model.encode_image(model.preprocess(images))

    assert is_smooth(features, images)
    ids = model.tokenize(["a cat", "two dogs in the rain"])
    name = "text.token_embedding.weight"

    def of_text(x):
        return functional_call(model, {name: x}, (None, ids))[1]

    assert is_smooth(of_text, model.state_dict()[name])
    assert model.logit_scale.dtype == torch.float64


def test_classifier_and_its_variation():
    model = double(Classifier(ClassifierConfig(3, 16, [8, 8])))
    assert is_smooth(model, random(2, 3, 16, 16))
    assert is_smooth(model, random(2, 3, 20, 20))  # which are scaled first
    seeds = torch.arange(2)
    assert is_smooth(lambda x: vary(x, VaryConfig(), seeds), 0.1 + 0.8 * random(2, 3, 8, 8))
