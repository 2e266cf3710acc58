"""Images of an evaluation: each by its own seed, none twice, none missing, whoever draws them."""

import signal
import time

import numpy as np
import pytest
import torch
from conftest import pictures
from PIL import Image
from runs import Started, several

from maskgit import MaskGIT, MaskGITConfig, Pipeline
from maskgit.common import UserError
from maskgit.evaluation import generate
from maskgit.evaluation.sets import open_pixels
from vqgan import VQGAN, VQGANConfig
from vqgan.quantizer import QuantizerConfig

AGAINST = "--reference emoji:heldout --extractor emoji"


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    vqgan = VQGANConfig(
        channels=8,
        mult=[1, 2],
        z_channels=8,
        groups=4,
        quant_conv=True,
        quantizer=QuantizerConfig(16, 4),
    )
    config = MaskGITConfig(codebook_size=16, num_classes=3, grid=(4, 4), width=16, depth=1, heads=2)
    return Pipeline(VQGAN(vqgan), MaskGIT(config), ["a", "b", "c"])


def pixels(folder):
    return {file.name: np.asarray(Image.open(file)).tobytes() for file in folder.iterdir()}


def test_a_set_depends_neither_on_batches_nor_on_processes_nor_on_interruptions(pipe, tmp_path):
    labels = generate.choose_labels("random", 13, pipe.labels, [], 5)
    options = {"steps": 3}
    assert generate.draw(pipe, labels, 5, tmp_path / "one", options, 64) == 13
    for k in (1, 0):
        generate.draw(pipe, labels, 5, tmp_path / "two", options, 3, (k, 2))
    assert pixels(tmp_path / "one") == pixels(tmp_path / "two")
    (tmp_path / "two" / "000004.png").unlink()
    kept = (tmp_path / "two" / "000005.png").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"1 images are missing \(000004.png\)"):
        generate.check_complete(tmp_path / "two", 13)
    assert generate.draw(pipe, labels, 5, tmp_path / "two", options, 64) == 1
    assert (tmp_path / "two" / "000005.png").stat().st_mtime_ns == kept
    assert pixels(tmp_path / "one") == pixels(tmp_path / "two")
    generate.check_complete(tmp_path / "two", 13)
    (tmp_path / "two" / "mine.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 are none of its own \(mine.png\)"):
        generate.check_complete(tmp_path / "two", 13)


def test_runs_share_no_seed(pipe, tmp_path):
    one = pipe.sample([0, 0], seed=0, steps=3)
    two = pipe.sample([0, 0], seed=2, steps=3)
    four = pipe.sample([0] * 4, seed=0, steps=3)
    assert torch.equal(torch.cat([one, two]), four)


def test_policies_of_labels(tmp_path):
    names = ["a", "b", "c"]
    assert generate.choose_labels("balanced", 7, names, [], 0) == [0, 1, 2, 0, 1, 2, 0]
    drawn = generate.choose_labels("random", 3000, names, [], 0)
    assert set(drawn) == {0, 1, 2} and abs(drawn.count(0) - 1000) < 120
    assert drawn == generate.choose_labels("random", 3000, names, [], 0)
    assert generate.choose_labels("reference", 4, names, [2, 2, 2, 0, None], 0) == [0, 2, 2, 2]
    assert generate.choose_labels("balanced", 2, [], [], 0) == [None, None]
    file = tmp_path / "labels.txt"
    file.write_text("c\n0\n")
    assert generate.choose_labels(str(file), 2, names, [], 0) == [2, 0]
    with pytest.raises(UserError, match="this model has no classes"):
        generate.choose_labels(str(file), 2, [], [], 0)
    for policy, why in (
        (str(file), "2 lines for 3 images"),
        ("reference", "no labels of 3 classes"),
        ("blanced", "neither balanced, random, reference nor a text file"),
    ):
        with pytest.raises(UserError, match=why):
            generate.choose_labels(policy, 3, names, [], 0)


def test_labels_of_a_reference_are_taken_by_name(tmp_path):
    for i, (_, content) in enumerate(pictures(5)):
        file = tmp_path / "set" / ("c" if i < 4 else "b") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    images = open_pixels(str(tmp_path / "set"))
    assert generate.reference_labels(images, ["a", "b", "c"]) == [1, 2, 2, 2, 2]
    with pytest.raises(UserError, match="the model has no class 'b'"):
        generate.reference_labels(images, ["a", "c"])


def test_another_plan_in_the_same_folder_is_refused(tmp_path):
    plan = {"seed": 0, "settings": {"steps": 8, "temperature": (1.0, 0.5)}}
    generate.check_plan(tmp_path / "out", plan)
    generate.check_plan(tmp_path / "out", plan)
    with pytest.raises(UserError, match=r"seed: 0, now 1.*--out ANOTHER"):
        generate.check_plan(tmp_path / "out", {**plan, "seed": 1})


def test_a_disk_too_small_is_told_beforehand(tmp_path):
    generate.check_disk(tmp_path / "out", 30_000)
    with pytest.raises(UserError, match="may need 1,000,000,000,000 MB, and the disk has less"):
        generate.check_disk(tmp_path / "out", 10**18)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on(number, forked, tmp_path):
    out = tmp_path / "out"
    options = f"{AGAINST} --num 150 --batch-size 8 --steps 2".split()
    arguments = ["evaluate", "generator", *options, "--out", str(out)]
    started = Started(tmp_path, arguments)
    folder = out / "images" / "run-0"
    while not folder.is_dir() or len(list(folder.glob("0*.png"))) < 40:
        assert started.lives
        time.sleep(0.05)
    started.send(number)
    assert started.wait()[0] == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (out / "metrics.json").exists()
    before = {f.name: f.stat().st_mtime_ns for f in folder.glob("0*.png")}
    assert 40 <= len(before) < 150
    done = forked(*arguments)
    assert done.returncode == 0, done.stderr
    after = {f.name: f.stat().st_mtime_ns for f in folder.glob("0*.png")}
    assert len(after) == 150 and before.items() <= after.items()
    assert forked(*arguments, "--seed", "1").returncode == 2


@pytest.mark.slow
def test_two_processes_make_the_set_of_one(forked, tmp_path):
    words = f"evaluate generator {AGAINST} --num 130 --steps 2 --out".split()
    done = forked(*words, "one")
    assert done.returncode == 0, done.stderr
    both = [started.wait(1200) for started in several(tmp_path, [*words, "two"])]
    statuses, printed, errors = zip(*both, strict=True)
    assert statuses == (0, 0), errors
    assert "metrics.json" in printed[0] and "metrics.json" not in printed[1]
    one, two = (tmp_path / name / "images" / "run-0" for name in ("one", "two"))
    a, b = (
        np.stack([np.frombuffer(p, np.uint8) for _, p in sorted(pixels(f).items())])
        for f in (one, two)
    )
    assert len(a) == 130
    # The tokens are the same; convolutions round by the batch, which may move a byte by 1.
    assert np.abs(a.astype(int) - b).max() <= 1 and (a != b).mean() < 1e-4
