"""What an import takes: less than three times the file."""

import subprocess
import sys

import pytest
from conftest import ROOT
from safetensors.torch import save
from tiny_published import (
    draw,
    flax_bytes,
    halton_transformer,
    listed,
    narrow,
    official_transformer,
    put,
    stacked_bytes,
    taming_tokenizer,
)

MEASURE = """
import pathlib, sys, time
from maskgit.importing import import_files
def status(name):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) * 1024
import_files([sys.argv[1]], sys.argv[2] + "/warm", say=str)  # what is imported when first needed
pathlib.Path("/proc/self/clear_refs").write_text("5")
before, start = status("VmRSS"), time.perf_counter()
import_files([sys.argv[3]], sys.argv[2] + "/dest", *map(int, sys.argv[4:]), say=str)
print(status("VmHWM") - before, time.perf_counter() - start)
"""


def small(folder):
    """A file to begin with."""
    return put(folder / "last.ckpt", {"state_dict": taming_tokenizer(), "epoch": 3})


def memory(tmp_path, warm, file, *heads):
    """Bytes and seconds that an import takes, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, warm, tmp_path, file, *heads]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bytes_taken, seconds = done.stdout.split()
    return int(bytes_taken), float(seconds)


@pytest.mark.parametrize("kind", ["zip", "stacked", "flax", "safetensors"])
def test_memory_is_under_three_times_the_file(tmp_path, kind):
    if kind == "flax":
        content = flax_bytes(draw(narrow(listed("maskgit_flax_to_port.txt"), 2)))
    else:
        tensors = draw(narrow(listed("taming_f16_16384.txt"), 2))
        content = {"stacked": stacked_bytes, "safetensors": save}.get(kind, dict)(tensors)
    file = tmp_path / "model"
    put(file, content)
    taken, _ = memory(tmp_path, small(tmp_path), file)
    assert taken < 3 * file.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "flax"])
def test_a_file_of_a_gigabyte(tmp_path, kind, capsys):
    file = tmp_path / "model"
    if kind == "zip":
        tensors = halton_transformer(side=24, width=1536, depth=12)
        put(file, {"model_state_dict": tensors})
        del tensors
        taken, seconds = memory(tmp_path, small(tmp_path), file, 16)
    else:
        put(file, flax_bytes(official_transformer(side=16, width=1152, heads=16, depth=16)))
        taken, seconds = memory(tmp_path, small(tmp_path), file)
    size = file.stat().st_size
    with capsys.disabled():
        print(f"\n{kind}: {size / 1e9:.2f} GB, {taken / size:.2f} times that, {seconds:.0f} s")
    assert taken < 3 * size
