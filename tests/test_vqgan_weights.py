"""Published tokenizers: each layout loads, exactly, and nothing that is wrong with one passes."""

import argparse

import pytest
import torch
from conftest import one_line
from straight_vqgan import (
    fill,
    keys,
    llamagen_shapes,
    llamagen_steps,
    maskbit_shapes,
    official_steps,
    port_steps,
    small,
    straight,
    taming_shapes,
    taming_steps,
)

from maskgit.common import UserError
from maskgit.common.published import read_tensors
from vqgan import VQGAN
from vqgan.weights import published

F8 = {"mult": (1, 2, 2, 4), "z": 4, "dim": 4, "codes": 16384}
GUMBEL = {"mult": (1, 1, 2, 4), "codes": 8192, "gumbel": True}
# By case: the family, names and shapes at full width, the steps, whether images are in [-1, 1], and
# whether codes are unit vectors.
CASES = {
    "official": (
        "official MaskGIT",
        keys("maskgit_flax_to_port.txt"),
        official_steps(),
        False,
        False,
    ),
    "port": ("MaskGIT, ported", keys("maskgit_port.txt"), port_steps(), False, False),
    "maskbit": (
        "MaskGIT, ported, MaskBit's names",
        maskbit_shapes(),
        port_steps("res_blocks", "mid.res_blocks"),
        False,
        False,
    ),
    "taming-1024": ("taming", taming_shapes(), taming_steps(5), True, False),
    "taming-16384": ("taming", taming_shapes(codes=16384), taming_steps(5), True, False),
    "taming-f8": ("taming", taming_shapes(**F8), taming_steps(4), True, False),
    "gumbel": ("taming, Gumbel", taming_shapes(**GUMBEL), taming_steps(4), True, False),
    "llamagen-16": ("LlamaGen", llamagen_shapes(), llamagen_steps(5), True, True),
    "llamagen-8": ("LlamaGen", llamagen_shapes((1, 2, 2, 4)), llamagen_steps(4), True, True),
}


def pictures(count=2, height=32, width=48):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def run(model, images):
    """As `straight` does it: latents, tokens, decoded images."""
    with torch.no_grad():
        tokens = model.encode(images)
        return model.latents(images), tokens, model.decode(tokens)


def close(one, other):
    """Whether latents and decoded images agree to 1e-4, and tokens are equal."""
    (z, tokens, decoded), (z2, tokens2, decoded2) = one, other
    equal = torch.equal(tokens, tokens2)
    return equal and max((z - z2).abs().max(), (decoded - decoded2).abs().max()) < 1e-4


def test_the_writers_of_these_tests_make_the_published_layouts():
    assert taming_shapes(codes=16384) == keys("taming_f16_16384.txt")
    assert llamagen_shapes() == keys("llamagen_vq16.txt")
    assert llamagen_shapes((1, 2, 2, 4)) == keys("llamagen_vq8.txt")
    assert len(keys("maskgit_port.txt")) == len(keys("maskgit_flax_to_port.txt")) == 168


def exact(case, shapes, images):
    family, _, steps, signed, unit = CASES[case]
    weights = fill(shapes)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    found, model = published(weights)
    assert found == family and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = straight(weights, steps, images, signed, unit)
    assert len(expected[1].unique()) > 2  # or tokens would say little
    assert close(run(model, images), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())
    return model


@pytest.mark.parametrize("case", CASES)
def test_exact_at_full_structure(case, tmp_path):
    images = pictures()
    model = exact(case, small(CASES[case][1]), images)
    model.save_pretrained(tmp_path)
    assert close(run(VQGAN.from_pretrained(tmp_path), images), run(model, images))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_exact_at_full_width(case):
    exact(case, CASES[case][1], pictures(1))


def trapped(case, *traps, weights=None, steps=None, images=None):
    """Assert that the tokenizer of a case is right, and that each trap would have been seen."""
    _, shapes, usual, signed, unit = CASES[case]
    weights = weights or fill(small(shapes))
    images = pictures() if images is None else images
    ours = run(published(weights)[1], images)
    assert close(ours, straight(weights, steps or usual, images, signed, unit))
    for trap in traps:
        assert not close(ours, straight(weights, steps or usual, images, signed, unit, trap)), trap
    return ours


MASKGIT = ("official", "port", "maskbit")
LAYOUTS = (*MASKGIT, "taming-f8", "gumbel", "llamagen-8")  # one case each
TAMING = ("taming-1024", "taming-f8", "gumbel", "llamagen-16", "llamagen-8")


@pytest.mark.parametrize("case", MASKGIT)
def test_the_shortcut_takes_the_blocks_own_output(case):
    """After its second convolution. A kernel as wide as the input, which is dropped, is refused."""
    trapped(case, "shortcut")
    weights = fill(small(CASES[case][1]))
    theirs = [n for n, w in weights.items() if w.shape[-2:] == (1, 1) or w.shape[:2] == (1, 1)]
    name = next(n for n in theirs if "Conv_2" in n or "nin_shortcut" in n)
    weights[name] = weights[name][:, :, ::2] if "/" in name else weights[name][:, ::2]
    with pytest.raises(UserError) as error:
        published(weights)
    one_line(error, f"1 of another shape ({name})")


@pytest.mark.parametrize("case", TAMING)
def test_strided_convolutions_are_padded_right_and_below(case):
    trapped(case, "symmetric padding")


@pytest.mark.parametrize("case", CASES)
def test_the_norms_epsilon(case):
    """torch's default, 1e-5, shows where features vary little."""
    weights = fill(small(CASES[case][1]))
    for name in weights:
        if name.startswith(("params/encoder/Conv_0/", "encoder.conv_in.")):
            weights[name] *= 0.02
    trapped(case, "eps", weights=weights)


@pytest.mark.parametrize("case", MASKGIT)
def test_some_convolutions_have_no_bias(case):
    """The encoder's first and all of the blocks', and no others."""
    trapped(case, "biases")
    _, model = published(fill(small(CASES[case][1])))
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    biased = [name for name in names if model.get_submodule(name).bias is not None]
    last = ["encoder.conv_out", "decoder.conv_in", "decoder.conv_out"]
    ups = [name for name in biased if name.endswith(".conv")]
    assert sorted(biased) == sorted([*last, *ups]) and len(ups) == 4


def test_attention_stands_at_the_level_of_the_training_resolution():
    """At the level that was 16 wide there, whatever the size of the image at hand."""
    images = pictures(1, 64, 64)  # 16 wide at level 2, 4 wide at the last
    trapped("taming-1024", "attention by the image's size", images=images)
    for case, level in (("taming-1024", 4), ("taming-f8", 3), ("gumbel", 3), ("llamagen-8", 3)):
        _, model = published(fill(small(CASES[case][1])))
        assert model.config.attention == [level] and model.config.middle_attention
    _, model = published(fill(small(CASES["port"][1])))
    assert model.config.attention == [] and not model.config.middle_attention


def test_attention_of_a_single_block():
    """A port in use leaves it out where a level has but one."""
    weights, images = fill(small(taming_shapes(blocks=1))), pictures()
    ours = trapped("taming-1024", weights=weights, steps=taming_steps(5, 1))
    assert not close(ours, straight(weights, taming_steps(5, 1, several=True), images, True))
    assert published(weights)[1].config.encoder_blocks == 1


@pytest.mark.parametrize("case", ["llamagen-16", "llamagen-8"])
def test_codes_and_latents_are_unit_vectors_in_search_and_decoder(case):
    trapped(case, "raw codes in the search", "raw codes in the decoder")


def test_codes_are_raw_elsewhere():
    for case in ("port", "taming-1024"):
        _, _, steps, signed, _ = CASES[case]
        weights = fill(small(CASES[case][1]))
        ours = trapped(case, weights=weights)
        assert not close(ours, straight(weights, steps, pictures(), signed, unit=True))


def test_llamagens_decoder_counts_its_levels_from_the_lowest_resolution():
    """Where all levels are equally wide, nothing but the result tells."""
    weights = fill(small(llamagen_shapes((1, 1, 1))))
    ours = trapped("llamagen-16", weights=weights, steps=llamagen_steps(3))
    wrong = llamagen_steps(3, reverse=True)
    assert not close(ours, straight(weights, wrong, pictures(), True, unit=True))


@pytest.mark.parametrize("averaged", [True, False])
def test_llamagens_checkpoints_are_nested(tmp_path, averaged):
    """The averaged weights, where there are some, and never those beside them."""
    shapes, (_, _, steps, signed, unit) = small(llamagen_shapes()), CASES["llamagen-16"]
    model, ema = fill(shapes), fill(shapes, seed=5)
    content = {"model": model, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "lr": 1}}
    content |= {"discriminator": {"main.0.weight": torch.zeros(3)}, "steps": 5}
    content |= {"args": argparse.Namespace(ema=averaged), **({"ema": ema} if averaged else {})}
    torch.save(content, tmp_path / "vq_ds16_c2i.pt")
    ours = run(published(read_tensors(tmp_path / "vq_ds16_c2i.pt"))[1], pictures())
    for weights, right in ((model, not averaged), (ema, averaged)):
        assert close(ours, straight(weights, steps, pictures(), signed, unit)) == right


def test_gumbels_codes_are_those_of_the_greatest_logit():
    trapped("gumbel", "noise", "nearest")


@pytest.mark.parametrize("case", CASES)
def test_the_range_of_images(case):
    trapped(case, "range")
    assert published(fill(small(CASES[case][1])))[1].config.signed == (case not in MASKGIT)


def test_flax_kernels_are_transposed():
    trapped("official", "kernel transposed")


def test_gumbel_codebooks_are_for_use_only():
    _, model = published(fill(small(CASES["gumbel"][1])))
    for quantize in (True, False):
        with pytest.raises(UserError) as error:
            model.train()(pictures(), quantize=quantize)
        one_line(error, "no training of a Gumbel codebook", "model.quantizer.gumbel=false")
    images, tokens = pictures(), model.encode(pictures())
    with torch.no_grad():  # and whatever the precision around it
        half = model.bfloat16()
        logits = torch.nn.functional.conv2d(
            half.latents(images).float(),
            half.quantizer.proj.weight.float(),
            half.quantizer.proj.bias.float(),
        )
    assert torch.equal(half.encode(images), logits.argmax(1)) and tokens.dtype == torch.int64


def test_half_precision_is_widened():
    weights = {name: tensor.half() for name, tensor in fill(small(taming_shapes())).items()}
    _, model = published(weights)
    expected = {name: tensor.float() for name, tensor in weights.items()}
    _, _, steps, signed, unit = CASES["taming-1024"]
    assert close(run(model, pictures()), straight(expected, steps, pictures(), signed, unit))
