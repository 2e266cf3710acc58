"""Files that are nearly those of a published tokenizer: what is dropped, and what is refused."""

import re

import pytest
import torch
from conftest import one_line
from straight_vqgan import fill, keys, maskbit_shapes, small, taming_shapes
from test_vqgan_weights import CASES, LAYOUTS

from maskgit.common import UserError
from maskgit.common.folder import write_tensors
from maskgit.importing import recognise
from vqgan.weights import published

BALLAST = {
    "taming-1024": ["loss.perceptual_loss.lin0.model.1.weight", "loss.discriminator.main.0.bias"],
    "gumbel": ["loss.discriminator.main.3.num_batches_tracked", "optimizer_states.0.exp_avg"],
    "llamagen-16": ["quantize.codebook_used", "optimizer.state.0.exp_avg"],
}


@pytest.mark.parametrize("case", BALLAST)
def test_what_only_training_needs_is_dropped(case):
    weights = fill(small(CASES[case][1]))
    extra = dict.fromkeys(BALLAST[case], torch.zeros(3))
    first, second = published(weights)[1], published({**extra, **weights})[1]
    state = second.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("case", ["taming-1024", "gumbel"])
def test_tamings_discriminator_is_dropped(case):
    shapes, weights = keys("taming_patchgan3.txt"), fill(small(CASES[case][1]))
    assert len(shapes) == 22
    extra = {
        f"loss.discriminator.{name}": torch.zeros(shape) if shape else torch.tensor(7)  # a counter
        for name, shape in shapes.items()
    }
    assert published({**weights, **extra})[0] == CASES[case][0]
    refused({**weights, "discriminator.main.0.weight": torch.zeros(1)}, "1 left over (discr")


def refused(weights, *parts):
    with pytest.raises(UserError) as error:
        published(weights)
    one_line(error, *parts)
    return str(error.value)


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_tensor_that_is_missing_or_of_another_shape_is_told_and_no_other(case):
    family, shapes, *_ = CASES[case]
    weights = {name: torch.zeros(shape) for name, shape in small(shapes).items()}
    weights.pop("quantize.codebook_used", None)
    sizes = r"coder/Conv_[01]/|conv_in\.|conv_out\.weight|quant"  # where sizes are taken from
    ends = [name for name in weights if re.search(sizes, name)]
    for name in {*list(weights)[::83], *ends}:
        rest = {other: tensor for other, tensor in weights.items() if other != name}
        message = refused(rest, family, f"1 missing ({name})")
        assert "another shape" not in message and "left over" not in message
        *most, last = weights[name].shape  # as many codes as there are in the file are right
        wider = torch.zeros(*most, last + 1)
        message = refused({**weights, name: wider}, family, f"1 of another shape ({name})")
        assert "missing" not in message and "left over" not in message


@pytest.mark.parametrize("case", ["official", "taming-1024"])
def test_numbers_are_of_floating_point(case):
    weights = {name: torch.zeros(shape) for name, shape in small(CASES[case][1]).items()}
    name = list(weights)[7]
    for kind in (torch.uint8, torch.int32, torch.complex64):
        wrong = {**weights, name: weights[name].to(kind)}
        refused(wrong, f"1 not of floating point ({name})")


def test_sizes_that_no_tokenizer_has():
    shapes = small(taming_shapes())
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    refused({**weights, "quantize.embedding.weight": torch.empty(1 << 60, 0)}, "too large")
    wide = torch.empty(1 << 40, 0)
    refused({n: wide if ".down.0" in n or ".up.0" in n else w for n, w in weights.items()}, "large")
    for name in ("conv_blocks.{}.res.0", "conv_blocks.0.res.{}"):
        names = [f"encoder.{name.format(i)}.norm1.weight" for i in range(3000)]
        refused(dict.fromkeys(names, torch.zeros(32)), "LlamaGen", "more than 12 levels")
    names = [f"params/{side}/ResBlock_999/Conv_0/kernel" for side in ("encoder", "decoder")]
    names += [f"params/decoder/Conv_{i}/kernel" for i in range(999)]
    refused(dict.fromkeys(names, torch.zeros(3, 3, 32, 32)), "official MaskGIT", "left over")


def test_a_tensor_under_flax_s_name_and_the_port_s():
    weights = {name: torch.zeros(shape) for name, shape in small(CASES["official"][1]).items()}
    name = "encoder.conv_in.weight"
    refused({**weights, name: torch.zeros(32, 3, 3, 3)}, "official MaskGIT", name, "two names")


PLUS = {name: torch.zeros(shape) for name, shape in small(maskbit_shapes()).items()}
TAMED = {name: torch.zeros(shape) for name, shape in small(taming_shapes()).items()}
AVERAGED = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in TAMED.items()}
UPSIDE_DOWN = {re.sub(r"up\.(\d)", lambda m: f"up.{4 - int(m[1])}", n): PLUS[n] for n in PLUS}
BITS = {n: w for n, w in PLUS.items() if not n.startswith("quantize.")}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [  # relatives whose networks are others: VQGAN+ with its decoder counted from below, with
        # strided convolutions, with bits for codes; Open-MAGVIT2
        (UPSIDE_DOWN, "left over (decoder.up.0.upsample_conv."),
        ({**PLUS, "encoder.down.0.down_conv.weight": torch.zeros(32, 32, 3, 3)}, "left over"),
        (BITS, "missing (quantize.embedding.weight)"),
        ({**BITS, "quantize.bits_to_indices": torch.zeros(12)}, "1 left over"),
        ({**TAMED, **AVERAGED}, "343 left over (model_ema."),
        ({**AVERAGED, "model_ema.decay": torch.zeros(1)}, "matches no tokenizer"),
    ],
)
def test_relatives_that_are_not_known_here(tmp_path, tensors, told):
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError) as error:
        recognise(str(tmp_path / "a.safetensors"))
    one_line(error, told)


@pytest.mark.parametrize("case", LAYOUTS)
def test_tensors_that_are_left_over_are_told(case):
    weights = {name: torch.zeros(shape) for name, shape in small(CASES[case][1]).items()}
    extra = ["params/encoder/ResBlock_3/Conv_0/bias" if case == "official" else "model_ema.decay"]
    extra += ["encoder.extra", "logvar"]
    message = refused({**weights, **dict.fromkeys(extra, torch.zeros(1))}, "3 left over")
    assert all(name in message for name in extra) and "missing" not in message


def test_many_wrong_tensors_are_told_in_one_line():
    weights = {name: torch.zeros(shape) for name, shape in small(taming_shapes()).items()}
    half = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.")}
    refused(half, "taming", "missing (decoder.", " more)")
    refused({"encoder.mid.block_1.norm1.weight": torch.zeros(32)}, "taming", "missing")
    odd = {name: torch.zeros([n + (n == 64) for n in w.shape]) for name, w in weights.items()}
    refused(odd, "65", "32 channels")


@pytest.mark.parametrize(
    "names",
    [
        [],
        list(keys("maskgit_transformer_flax.txt")),
        list(keys("halton_transformer.txt")),
        ["visual.conv1.weight", "text_projection"],
        ["encoder.down_blocks.0.resnets.0.conv1.weight", "quantize.embedding.weight"],
        ["first_stage_model.encoder.mid.block_1.norm1.weight"],
    ],
)
def test_other_files_are_no_tokenizers(names):
    assert published(dict.fromkeys(names, torch.zeros(2, 2))) is None
