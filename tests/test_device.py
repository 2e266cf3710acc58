"""Device and type: named ones, what "auto" takes, and those that are not there."""

from pathlib import Path

import pytest
import torch

from maskgit.common import UserError
from maskgit.common.device import cpu_abilities, pick_device, pick_dtype

CPU = torch.device("cpu")
no_gpu = not torch.cuda.is_available()


def test_named_devices():
    assert pick_device("cpu") == pick_device(CPU) == CPU
    assert pick_device("auto").type == pick_device().type == ("cpu" if no_gpu else "cuda")


@pytest.mark.parametrize("name", ["cud", "gpu", "meta", "", "cuda:x", "cuda:99"])
def test_unknown_and_absent_devices_are_refused(name):
    with pytest.raises(UserError, match=r"device|GPU") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


def test_cuda_without_a_gpu_is_refused():
    if no_gpu:
        with pytest.raises(UserError, match="no GPU"):
            pick_device("cuda")
    else:
        assert pick_device("cuda").type == "cuda"


def test_named_types():
    assert pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("fp16", CPU) == torch.float16
    assert pick_dtype(torch.float16, CPU) == torch.float16
    with pytest.raises(UserError, match="did you mean 'fp32'"):
        pick_dtype("f32", CPU)


def test_auto_follows_the_processor_as_the_kernel_describes_it():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    units = bool({"amx_bf16", "avx512_bf16"} & flags)
    assert pick_dtype("auto", CPU) == (torch.bfloat16 if units else torch.float32)
    assert cpu_abilities()["AVX2"] == ("avx2" in flags)
