"""Published files of every format, read by their content."""

import random

import pytest
import torch
from conftest import one_line
from safetensors.torch import save
from tiny_published import (
    flax_bytes,
    put,
    stacked_bytes,
    tar_bytes,
)

from maskgit.common import UserError
from maskgit.common.folder import write_tensors
from maskgit.common.published import file_format, read_tensors

TENSORS = {"a.weight": torch.randn(4, 6), "b.bias": torch.arange(5)}
SHARED = torch.ones(1000)
FORMATS = {
    "safetensors": save(TENSORS),
    "stacked": stacked_bytes({"state_dict": TENSORS}),
    "tar": tar_bytes(TENSORS),
    "flax": flax_bytes(TENSORS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_by_its_content(tmp_path, name):
    path = tmp_path / "model.bin"
    put(path, FORMATS[name])
    assert file_format(path) == {"stacked": "torch", "tar": "torch"}.get(name, name)
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())


def other(value):
    return {name: torch.full_like(tensor, value) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"ema": TENSORS, "model": other(1), "state_dict": other(2)},
        {"model": TENSORS, "state_dict": other(2), "optimizer": {"state": {0: other(3)}}},
        {"ema": 0.999, "state_dict": TENSORS, "model_state_dict": other(2)},
        {"ema": {}, "model_state_dict": TENSORS, "args": {"model": "small"}},
        {"state_dict": {"model": {f"module._orig_mod.{k}": v for k, v in TENSORS.items()}}},
        {f"_orig_mod.module.{name}": tensor for name, tensor in TENSORS.items()},
    ],
)
def test_weights_in_a_training_checkpoint(tmp_path, content):
    found = read_tensors(put(tmp_path / "a.pt", content))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())


def test_files_that_hold_no_weights(tmp_path):
    cases = [
        (b"", "no format known"),
        (b"GIF89a" + bytes(600), "no format known"),
        (b"\x80", "damaged"),
        (b"PK\x03\x04", "truncated"),
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "holds no tensors"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "two tensors a"),
        ({"a\nb": torch.ones(1)}, "no text"),
        ({"a": torch.ones(1), "b": torch.empty(0, 1 << 40)}, "without numbers (b)"),
        ({str(i): SHARED for i in range(9)}, "many names"),
        (save({"x" * 1001: torch.ones(1)}), "no text"),
        (save({}), "holds no tensors"),
        (save(TENSORS)[:-1], "truncated"),
    ]
    for content, part in cases:
        with pytest.raises(UserError) as error:
            read_tensors(put(tmp_path / "a.bin", content))
        one_line(error, "a.bin", part)
    with pytest.raises(UserError) as error:
        read_tensors(tmp_path / "nowhere")
    one_line(error, "nowhere")
    with pytest.raises(UserError) as error:
        read_tensors(tmp_path)
    one_line(error, tmp_path)


def test_a_tensor_can_stand_there_under_two_names(tmp_path):
    found = read_tensors(put(tmp_path / "a.pt", {"a": SHARED, "b": SHARED}))
    assert torch.equal(found["a"], found["b"])


@pytest.mark.parametrize("name", [*FORMATS, "zip"])
def test_cut_and_flipped_files_of_each_format(tmp_path, name):
    if name == "zip":
        torch.save({"state_dict": TENSORS}, tmp_path / "good")
    right = FORMATS[name] if name in FORMATS else (tmp_path / "good").read_bytes()
    generator, refused = random.Random(2), 0
    for turn in range(200):
        changed = bytearray(right)
        if turn % 2:
            del changed[generator.randrange(len(changed)) :]
        else:
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        try:
            read_tensors(put(tmp_path / "a.bin", bytes(changed)))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and "a.bin" in str(error)
    assert refused > 20


def test_what_is_written_is_what_the_library_writes(tmp_path):
    kinds = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "int8", "bool")
    content = {f"{kind} ä": torch.arange(7).to(getattr(torch, kind)) for kind in kinds}
    content |= {"turned": torch.randn(3, 4).T.contiguous(), "b": torch.tensor(1.5)}
    content |= {"none": torch.empty(0, 2)}
    for metadata in (None, {"format": "pt"}):
        write_tensors(tmp_path / "a", content, metadata)
        assert (tmp_path / "a").read_bytes() == save(content, metadata)
