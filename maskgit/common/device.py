"""Which device and which floating-point type to compute with."""

import os
import shutil
from typing import TYPE_CHECKING

from maskgit.common.errors import UserError, nearest, pick

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def pick_device(name: "str | torch.device" = "auto") -> "torch.device":
    """The device called `name`: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".

    Raises UserError for an unknown name, and for a GPU that is not there.
    """
    import torch

    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: {nearest(name, ('auto', 'cpu', 'cuda'))}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no GPU for device {name!r}: PyTorch finds none, use 'cpu' or 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"no GPU {device.index}: there are {torch.cuda.device_count()}, from 0")
    return device


def pick_dtype(name: "str | torch.dtype", device: "torch.device") -> "torch.dtype":
    """The type called `name` ("fp32", "bf16", "fp16", or "auto") for computing on `device`.

    "auto" asks what the hardware can do and never how fast it is at the moment, because a seed
    has to name the same image each time: bf16 where there are matrix units for it, else fp32.
    """
    import torch

    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        name = "bf16" if _has_bf16_units(device) else "fp32"
    return getattr(torch, pick(DTYPES, name, "dtype"))


def cpu_abilities() -> dict[str, bool]:
    """Which of the instruction sets that matter here the processor and its kernel offer."""
    import torch

    return {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX512": torch.cpu._is_avx512_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }


def _has_bf16_units(device: "torch.device") -> bool:
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = cpu_abilities()
    return abilities["AMX"] or abilities["AVX512-BF16"]


def can_compile(device: "torch.device") -> bool:
    """Whether torch.compile has what it needs: for a processor, a C++ compiler."""
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    return device.type != "cpu" or any(shutil.which(name) for name in compilers)
