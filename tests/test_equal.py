"""Processes and micro-batches are a matter of speed: what a run learns is the same.

In float64, in which rounding has 1e-16 to play with, the weights of every step are compared; in
fp32 the first gradients and the losses: of all steps, of tokenizers the first three. One run of
each task stands for its losses, with everything on that could see how a batch is shared out: see
`RUNS` in equal_run.py.
"""

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, pictures
from equal_run import DECAY, RUNS, STEPS, TOKENIZER
from safetensors.torch import load_file

from vqgan import VQGAN, VQGANConfig

QUICK = ["tokenizer", "transformer", "clip"]
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in RUNS
]
# processes, micro-batches in each, and which process
OTHERS = [(1, 2, 0), (1, 4, 0), (2, 1, 0), (2, 2, 0)]


def launch(world, *arguments):
    """Start `world` processes of equal_run.py, with what launchers put into the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    if world > 1:
        shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {} for r in range(world)]
    command = [sys.executable, str(ROOT / "tests" / "equal_run.py"), *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, **own},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in ranks
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(name, kind, processes, micro, rank)`: the tensors and the logs of a run."""
    root = tmp_path_factory.mktemp("equal")
    for i, (_, content) in enumerate(pictures(40)):
        file = root / "data" / "abc"[i % 3] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.with_suffix(".txt").write_text(f"picture {i // 2}\nnumber {i}")
    torch.manual_seed(0)
    VQGAN(VQGANConfig(**TOKENIZER)).save_pretrained(root / "tokenizer")
    done = set()

    def train(group):
        arguments = (root / "data", root / "tokenizer", root, *group)
        processes = [process for world in (1, 2) for process in launch(world, *arguments)]
        try:
            for process in processes:
                _, errors = process.communicate(timeout=1200)
                assert process.returncode == 0, errors
        finally:
            for process in processes:
                process.kill()
        done.update(group)

    def of(name, *which):
        if name not in done:
            train(QUICK if name in QUICK else [n for n in RUNS if n not in QUICK])
        path = root / "-".join(map(str, (name, *which)))
        return load_file(f"{path}.safetensors"), json.loads(path.with_suffix(".json").read_text())

    return of


def compare_logs(one, other, besides, first, later):
    """first, later: how far, relative to what they are, values of the first step and of later ones
    may be from each other. What the loss is above chance counts as a part of the loss."""
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.keys() == b.keys() and "loss" in a
        for key in a.keys() - besides:
            whole, relative = (
                "loss" if key == "loss_above_chance" else key,
                later if step else first,
            )
            near = pytest.approx(a[key], rel=0, abs=max(1e-12, relative * abs(a[whole])))
            assert b[key] == near, (step, key)


def own(name, processes):
    """What each process logs of its own images alone."""
    return {"top1"} if processes > 1 and RUNS[name]["task"] == "clip" else set()


@pytest.mark.parametrize("name", NAMES)
def test_in_float64_all_weights_of_all_steps_are_the_same(trained, name):
    one, logs = trained(name, "float64", 1, 1, 0)
    assert {x.dtype for key, x in one.items() if key != "restarts"} == {torch.float64}
    moved = (one["history"].diff(dim=0).abs().amax(1) > 1e-6).tolist()
    assert moved == [True] * (STEPS - 1) + [moved[-1]]  # the last step's rate may be 0
    for which in OTHERS:
        other, its_logs = trained(name, "float64", *which)
        assert other.keys() == one.keys()
        for key, tensor in one.items():
            assert torch.allclose(other[key], tensor, rtol=0, atol=1e-8), (which, key)
        compare_logs(logs, its_logs, own(name, which[0]), 1e-8, 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_in_fp32_the_first_gradients_and_all_losses_are_the_same(trained, name):
    one, logs = trained(name, "float32", 1, 1, 0)
    gradients = {key: tensor for key, tensor in one.items() if key.startswith("gradient/")}
    assert {tensor.dtype for tensor in gradients.values()} == {torch.float32}
    norms: dict[str, float] = {}
    for key, tensor in gradients.items():
        part = key.split("/")[1]
        norms[part] = norms.get(part, 0) + tensor.square().sum().item()
    for which in OTHERS:
        other, its_logs = trained(name, "float32", *which)
        for key, tensor in gradients.items():
            # A bias in front of a norm has no gradient: what is there is the others' rounding.
            scale = tensor.norm() + 1e-2 * norms[key.split("/")[1]] ** 0.5
            assert (other[key] - tensor).norm() <= 1e-5 * scale, (which, key)
        # Later, Adam has divided what is hardly a gradient by its size, its rounding with it; a
        # tokenizer then finds another code for a latent that lies between two.
        tokenizer = RUNS[name]["task"] == "vqgan"
        assert len(logs) == (3 if tokenizer else STEPS)
        compare_logs(logs, its_logs, own(name, which[0]), 1e-5, 1e-4 if tokenizer else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_processes_have_the_same_weights_to_the_last_bit(trained, name):
    for kind in ("float64", "float32"):
        for micro in (1, 2):
            (one, logs), (two, other) = (trained(name, kind, 2, micro, rank) for rank in (0, 1))
            assert one.keys() == two.keys() and logs == other
            assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_average_equals_its_closed_form(trained, name):
    """Each step's weights by what all later steps leave of them, and the start by the rest."""
    found, _ = trained(name, "float64", 1, 1, 0)
    decays = [min(DECAY, (1 + t) / (10 + t)) for t in range(STEPS)]
    left = [math.prod(decays[t:]) for t in range(STEPS + 1)]  # of what was there before step t
    shares = [left[0], *((1 - decays[t]) * left[t + 1] for t in range(STEPS))]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    expected = sum(share * weights for share, weights in zip(shares, found["history"], strict=True))
    assert (found["averaged"] - expected).abs().max() < 1e-12
    assert (found["averaged"] - found["history"][-1]).abs().max() > 1e-5


def test_everything_that_could_tell_was_on(trained):
    found, logs = trained("tokenizer", "float64", 1, 1, 0)
    assert found["restarts"] > 5
    together = {key for logged in logs for key in logged}
    assert {"entropy", "adversarial", "features", "r1", "edges"} <= together
    weights = [logged["adversarial_weight"] for logged in logs if "adversarial_weight" in logged]
    assert len(set(weights)) == len(weights) == 12 and max(weights) < 1  # not where it is bounded
    assert "entropy" not in logs[2] and "entropy" in logs[3]  # k-means lies between
    assert any(logged["gradient_generator"] > 0.5 for logged in logs)  # clipped
