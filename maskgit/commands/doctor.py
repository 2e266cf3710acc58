"""`maskgit doctor`: what this machine and this installation can do, one line each.

With --model, whether a model folder is whole: see `maskgit/checkup.py`.
"""

import argparse
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit.common.folder import BUNDLED, KINDS, file_hash, find

if TYPE_CHECKING:
    from maskgit.checkup import Finding

HELP = "say what this machine and this installation can do, or whether a model is whole"
EXAMPLE = "maskgit doctor"

PARTS = (*KINDS, "classifier")  # the folders of a bundled model that hold weights
LONGEST = 1000  # characters of a finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FOLDER", help="check this model instead: hashes, structure, tokens"
    )


def run(args: argparse.Namespace) -> int:
    """Print one line a finding; 0 if all is well, else 1."""
    usable = True
    for what, found, good in model_findings(args.model) if args.model else findings():
        line = f"{'' if good else 'PROBLEM: '}{what}: {found}"
        line = line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
        print("".join(c if c.isprintable() else "?" for c in line), flush=True)
        usable = usable and good
    return 0 if usable else 1


def model_findings(source: str) -> Iterator["Finding"]:
    """All that is looked at in a model: a folder, a bundled name, or a hub id."""
    from maskgit.checkup import check_folder

    yield from check_folder(find(source))


def findings() -> Iterator["Finding"]:
    """All that is looked at, the quick things first."""
    yield "python", f"{platform.python_version()} on {platform.platform(terse=True)}", True
    yield from requirements()
    yield from torch_and_devices()
    yield from weights()
    yield from optional_weights()
    disk = shutil.disk_usage(Path.cwd())
    yield "disk", f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free in {Path.cwd()}", True


def requirements() -> Iterator["Finding"]:
    """The installed version of each package that this one requires."""
    from packaging.requirements import Requirement

    try:
        required = metadata.requires("maskgit") or []
    except metadata.PackageNotFoundError:
        yield "maskgit", "runs from a checkout that is not installed: pip install -e .", True
        return
    yield "maskgit", metadata.version("maskgit"), True
    for requirement in map(Requirement, required):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield requirement.name, f"missing: pip install '{requirement}'", False
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        wanted = "" if fits else f", but wanted is {requirement.specifier}"
        yield requirement.name, version + wanted, fits


def torch_and_devices() -> Iterator["Finding"]:
    """Whether torch and torchvision load together, and what there is to compute with."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield "torch", f"does not load ({_line(error)})", False
        return
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # compiled against torch
        yield (
            "torch and torchvision",
            f"{torchvision.__version__} fits torch {torch.__version__}",
            True,
        )
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        way_out = "install the two of one release together"
        yield (
            "torchvision",
            f"does not fit torch {torch.__version__}: {way_out} ({_line(error)})",
            False,
        )

    from maskgit.common.device import cpu_abilities, pick_device, pick_dtype

    found = [name for name, there in cpu_abilities().items() if there]
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    yield "processor", f"{platform.machine()}, {cores}, {', '.join(found) or 'no AVX2'}", True
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield f"gpu {i}", f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB", True
    if not torch.cuda.is_available():
        yield "gpu", "none that this torch can use", True
    device = pick_device("auto")
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    yield "auto", f"device {device}, dtype {dtype}", True


def weights() -> Iterator["Finding"]:
    """The weights that travel with the project, with their hashes."""
    for name, folder in BUNDLED.items():
        for part in PARTS:
            file = folder / part / "model.safetensors"
            what = f"weights {name}/{part}"
            if file.is_file():
                size = file.stat().st_size / 1e6
                yield what, f"{size:.1f} MB, sha256 {file_hash(file)}", True
            else:
                yield what, f"missing: no file {file}", False


def optional_weights() -> Iterator["Finding"]:
    """Those that only some settings need, and that are too large to travel with the project."""
    try:
        from maskgit.common import UserError
        from maskgit.evaluation.inception import find_inception
        from vqgan.task import VQGANLossConfig
    except (ImportError, OSError):
        return  # told above
    file = Path(VQGANLossConfig().vgg).expanduser()
    found = f"sha256 {file_hash(file)}" if file.is_file() else f"none at {file}"
    yield "weights vgg16", f"{found}; only training with loss.perceptual above 0 needs it", True
    try:
        found = f"sha256 {file_hash(find_inception())}"
    except UserError as error:
        found = str(error).partition(":")[0]
    yield "weights inception", f"{found}; only maskgit evaluate needs it, for FID", True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
