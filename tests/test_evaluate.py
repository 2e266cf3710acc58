"""`maskgit evaluate`: what it writes, what it calls its numbers, and what it refuses."""

import csv
import io
import json

import numpy as np
import pytest
from conftest import pictures
from PIL import Image

from maskgit.commands.main import main
from maskgit.evaluation.extractors import open_extractor
from maskgit.evaluation.score import Scorer
from maskgit.evaluation.sets import open_set

EMOJI = ["--extractor", "emoji"]
HELDOUT = "--reference emoji:heldout"


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """`said(*arguments)` runs `maskgit evaluate` in `tmp_path`: its status, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["evaluate", *map(str, arguments)])
        return status, "".join(capsys.readouterr())

    return run


@pytest.fixture
def photos(tmp_path):
    """140 drawings as someone's own images, in two class folders."""
    for i, (name, content) in enumerate(pictures(140)):
        file = tmp_path / "photos" / "ab"[i % 2] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "photos"


def result(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_images_against_themselves_and_the_others(said, photos, tmp_path):
    status, text = said("images", photos, "--reference", photos, *EMOJI, "--out", "same")
    assert status == 0, text
    same = result(tmp_path / "same")
    values = {name: value["value"] for name, value in same["metrics"].items()}
    assert values["FD-emoji"] == pytest.approx(0, abs=1e-6)
    assert values["precision-emoji"] == values["recall-emoji"] == values["coverage-emoji"] == 1
    assert values["nearest distance-emoji"] == pytest.approx(0, abs=1e-3)
    assert same["protocol"] is None and "extractor emoji" in same["not_comparable"]
    assert same["images"]["hash"] == same["reference"]["hash"]
    assert same["images"]["count"] == 140 and same["class_counts"] == {"0": 70, "1": 70}
    assert "NOT COMPARABLE: n=140" in text and "left out: kid (needs 1,000 images" in text
    assert "FID" not in text and "Inception" not in text
    for file in ("grid.png", "nearest.png"):
        assert Image.open(tmp_path / "same" / file).width > 64
    with np.load(tmp_path / "same" / "statistics.npz") as statistics:
        assert statistics["mu"].dtype == np.float64 and statistics["sigma"].ndim == 2

    # what it wrote can be the reference of another run
    reference = ["--reference", "same/statistics.npz"]
    status, text = said("images", photos, *reference, *EMOJI, "--out", "again")
    assert status == 0 and "statistics alone" in text, text
    again = result(tmp_path / "again")["metrics"]
    assert list(again) == ["FD-emoji"] and again["FD-emoji"]["value"] < 1e-6

    status, text = said("images", "emoji:heldout", "--reference", photos, *EMOJI, "--out", "other")
    assert status == 0, text
    assert result(tmp_path / "other")["metrics"]["FD-emoji"]["value"] > 0.1
    status, text = said("compare", "same", "other")
    assert status == 0 and "images: 140, 189" in text and "NOT COMPARABLE with" in text
    status, text = said("compare", "same", "same/metrics.json")
    assert status == 0 and "comparable: all that matters is equal" in text


def test_a_tokenizer_against_the_same_crops(said, tmp_path):
    status, text = said("tokenizer", "--vqgan", "emoji", "--data", "emoji:heldout", *EMOJI)
    assert status == 0, text
    found = result(tmp_path / "evaluation")
    values = {name: value["value"] for name, value in found["metrics"].items()}
    assert values["PSNR (dB)"] >= 22 and 0.7 < values["SSIM"] < 1 and values["L1"] < 0.06
    assert values["bits per pixel"] == pytest.approx(10 / 64)  # 10 bits for 8x8 pixels
    assert values["code usage"] > 0.7 and 1 < values["perplexity"] < 1024
    assert values["rFD-emoji"] > 0 and "rFID" not in values
    assert "LPIPS" in values or "LPIPS" in found["left_out"]
    assert Image.open(tmp_path / "evaluation" / "reconstructions.png").width > 64
    assert len(found["model"]["sha256"]["vqgan"]) == 64 and "NOT COMPARABLE: n=189" in text


def test_a_generator_with_runs(said, tmp_path):
    options = f"{HELDOUT} --num 140 --runs 2 --steps 1 --npz --out out".split()
    status, text = said("generator", *options, *EMOJI)
    assert status == 0, text
    found = result(tmp_path / "out")
    assert found["seeds"] == [0, 279] and found["settings"]["steps"] == 1
    distance = found["metrics"]["FD-emoji"]
    assert distance["over"] == "2 runs" and distance["deviation"] > 0
    assert distance["value"] == pytest.approx(np.mean(distance["runs"]))
    assert sum(found["class_counts"].values()) == 140 and found["uint8"] == "round(255 x)"
    assert found["averaged_weights"] is True and found["versions"]["torch-fidelity"]
    assert {"vqgan", "transformer"} == set(found["model"]["sha256"])
    with np.load(tmp_path / "out" / "samples.npz") as archive:
        samples = archive["arr_0"]
    assert samples.shape == (140, 64, 64, 3) and samples.dtype == np.uint8
    first = np.asarray(Image.open(tmp_path / "out" / "images" / "run-0" / "000000.png"))
    assert np.array_equal(samples[0], first)
    names = tmp_path / "labels.txt"
    names.write_text("heart\n" * 20)
    labelled = [*f"{HELDOUT} --num 20 --steps 1 --out named --labels labels.txt".split(), *EMOJI]
    assert said("generator", *labelled)[0] == 0
    assert set(result(tmp_path / "named")["class_counts"].values()) == {20}
    names.write_text("cat-face\n" + "heart\n" * 19)
    status, text = said("generator", *labelled)
    assert status == 2 and "first labels" in text
    status, text = said("generator", *options, *EMOJI, "--seed", "7")
    assert status == 2 and "seed: 0, now 7" in text
    broken = tmp_path / "out" / "images" / "run-1" / "000139.png"
    broken.write_bytes(broken.read_bytes()[:100])
    status, text = said("generator", *options, *EMOJI)
    assert status == 2 and "000139.png" in text and text.count("\n\n") == 0


def test_a_sweep_goes_on_where_it_stood(said, tmp_path):
    options = f"{HELDOUT} --num 130 --steps 1,2 --schedule cosine,linear".split()
    arguments = ["sweep", *options, "--metrics", "fid,pr", *EMOJI, "--out", "sweep"]
    status, text = said(*arguments)
    assert status == 0, text
    folder = tmp_path / "sweep"
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [(row["steps"], row["schedule"]) for row in rows] == [
        ("1", "cosine"),
        ("1", "linear"),
        ("2", "cosine"),
        ("2", "linear"),
    ]
    # one step settles everything, whatever the schedule
    assert rows[0]["FD-emoji"] == rows[1]["FD-emoji"] != rows[2]["FD-emoji"]
    assert Image.open(folder / "sweep.png").width > 500
    assert len(json.loads((folder / "sweep.json").read_text())["cells"]) == 4
    kept = {file: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}
    (folder / "cells" / "steps-2_linear_guidance-0.json").unlink()
    before = (folder / "sweep.csv").read_text().splitlines()
    assert said(*arguments)[0] == 0
    after = (folder / "sweep.csv").read_text().splitlines()
    assert before[:-1] == after[:-1]
    assert before[-1].rsplit(",", 1)[0] == after[-1].rsplit(",", 1)[0]  # but for its rate
    status, text = said(*arguments, "--metrics", "fid")
    assert status == 2 and "--out ANOTHER" in text  # its cells would lack a metric
    changed = [f for f, time in kept.items() if f.stat().st_mtime_ns != time]
    assert [file.stem for file in changed] == ["steps-2_linear_guidance-0"]


def test_accuracy_needs_classes_that_both_sides_know(tmp_path):
    emoji = open_extractor("emoji", "cpu")
    blind = open_extractor("emoji", "cpu")
    blind.classes = []  # as the Inception network's, whose classes have no names here
    heldout = open_set("emoji:heldout")
    for extractor, classifier, classes, able in (
        (emoji, None, emoji.classes, True),
        (emoji, None, [], False),
        (blind, None, [], False),
        (blind, None, emoji.classes, False),
        (blind, emoji, emoji.classes, True),
    ):
        scorer = Scorer(extractor, heldout, tmp_path, classifier)
        names, left = scorer.choose(None, 500, classes)
        assert ("accuracy" in names) == able == ("accuracy" not in left)


def test_the_evaluators_file_gives_statistics_of_all_and_images_of_some(said, tmp_path):
    images = np.stack(
        [np.asarray(Image.open(io.BytesIO(c)).convert("RGB")) for _, c in pictures(120)]
    )
    with np.load(save_statistics_of(said, tmp_path)) as found:
        np.savez(tmp_path / "adm.npz", arr_0=images, **found)
    status, text = said("images", "emoji:heldout", "--reference", "adm.npz", *EMOJI, "--out", "adm")
    assert status == 0, text
    adm, whole = (result(tmp_path / name) for name in ("adm", "emoji"))
    assert adm["reference"]["kind"] == "adm" and adm["reference"]["count"] == 120
    assert adm["metrics"]["FD-emoji"]["value"] == pytest.approx(
        whole["metrics"]["FD-emoji"]["value"]
    )
    assert adm["metrics"]["recall-emoji"] != whole["metrics"]["recall-emoji"]


def save_statistics_of(said, tmp_path):
    """The statistics of the training drawings, made as a by-product of scoring them; and the
    held-out ones scored against the drawings themselves, in the folder `emoji`."""
    assert said("images", "emoji:heldout", "--reference", "emoji", *EMOJI, "--out", "emoji")[0] == 0
    assert said("images", "emoji", "--reference", "emoji", *EMOJI, "--out", "training")[0] == 0
    return tmp_path / "training" / "statistics.npz"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("generator --reference emoji", "--extractor emoji works without it"),
        ("images emoji --reference emoji", "--extractor emoji works without it"),
        ("images nowhere --reference emoji --extractor emoji", "nowhere is not there"),
        ("images emoji:heldout --reference nowhere --extractor emoji", "nowhere is not there"),
        (
            "images emoji:heldout --reference emoji --extractor emoji --metrics kid",
            "--metrics kid: needs 1,000 images, and there are 189",
        ),
        ("images emoji:heldout --reference emoji --extractor emij", "did you mean 'emoji'"),
        ("generator --reference emoji --extractor emoji --labels none", "nor a text file"),
        ("generator --reference emoji --extractor emoji --schedule cosin", "did you mean 'cosine'"),
        ("sweep --reference emoji --extractor emoji --steps 0", "at least 1"),
        ("sweep --reference emoji --extractor emoji --schedule cosin", "did you mean 'cosine'"),
        ("tokenizer --vqgan emoji --data emoji --extractor emoji --size 60", "give --size"),
        ("images emoji --reference emoji --extractor emoji --size -5", "at least 16"),
        ("generator --reference emoji --extractor emoji --seed -1", "at least 0"),
        ("compare nothing", "nothing is missing"),
        ("imagse", "did you mean 'images'"),
        ("", "which command?"),
    ],
)
def test_mistakes_are_told_before_the_work(arguments, why, said, tmp_path, monkeypatch):
    monkeypatch.delenv("MASKGIT_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    status, text = said(*arguments.split())
    assert status == 2 and why in text
    assert not (tmp_path / "evaluation" / "images" / "run-0").exists()
    assert not (tmp_path / "evaluation" / "metrics.json").exists()
