"""The best of several candidates: which they are, which is kept, and what is said of it."""

import json

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image
from test_pipeline import NAMES, tiny_transformer, tiny_vqgan
from tiny_clip import save_clip

from maskgit.commands.main import main
from maskgit.common import UserError
from maskgit.common.folder import file_hash
from maskgit.evaluation.clip_model import open_clip_model, weights_file
from maskgit.metadata import from_png
from maskgit.pipeline import Pipeline
from maskgit.rerank import rerank


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(tiny_vqgan(), tiny_transformer(), NAMES, {"steps": 3})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return open_clip_model(str(save_clip(tmp_path_factory.mktemp("clip"))), torch.device("cpu"))


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, clip, tmp_path, monkeypatch, capsys):
    """`run(*arguments)`: `maskgit sample` in an empty folder; its status, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["sample", "--model", str(model), *map(str, arguments)])
        return status, "".join(capsys.readouterr())

    return run


def test_the_candidate_nearest_to_the_class_is_kept(pipe, clip):
    labels = [0, 3, 0]
    kept = list(rerank(pipe, clip, labels, 4, seed=10))
    for i, (label, one) in enumerate(zip(labels, kept, strict=True)):
        seeds = [10 + 4 * i + c for c in range(4)]
        images = pipe.sample([label] * 4, seed=seeds)
        pixels = (images * 255).round() / 255
        with torch.no_grad():
            text = clip.model.encode_text(clip.model.tokenize([NAMES[label]]))
            image = clip.model.encode_image(clip.model.preprocess(pixels))
        cosines = image @ text[0]
        best = int(cosines.argmax())
        assert one.seed == seeds[best] and one.prompt == NAMES[label]
        assert one.score == pytest.approx(cosines.max().item(), abs=1e-6)
        torch.testing.assert_close(one.image, images[best])
    assert len({one.seed for one in kept}) == 3


@pytest.mark.parametrize("batch_size", [1, 5, 9])
def test_the_choice_does_not_depend_on_batches(pipe, clip, batch_size):
    labels = [1, 2, 0, 3]
    expected = list(rerank(pipe, clip, labels, 3, seed=2))
    found = list(rerank(pipe, clip, labels, 3, seed=2, batch_size=batch_size))
    assert [one.seed for one in found] == [one.seed for one in expected]


def test_images_of_no_class_are_refused(pipe, clip):
    with pytest.raises(UserError) as error:
        next(rerank(pipe, clip, [0, None], 2))
    one_line(error, "no class", "--rerank")


def test_metadata_say_how_to_draw_the_chosen_one_again(run, clip, tmp_path):
    arguments = ("--class", "cat,cow", "--num", 2, "--seed", 5, "--out", "best")
    chosen = ("--rerank", clip.source, "--candidates", 3)
    status, text = run(*arguments, *chosen, "--batch-size", 7)
    assert status == 0, text
    records = json.loads((tmp_path / "best" / "metadata.json").read_text())["images"]
    for i, record in enumerate(records):
        by = record["rerank"]
        assert by["sha256"] == file_hash(weights_file(clip.source)) and by["candidates"] == 3
        assert by["prompt"] == record["class"] and -1 <= by["cosine"] <= 1
        assert 5 + 3 * i <= record["seed"] < 5 + 3 * (i + 1)
        with Image.open(tmp_path / "best" / record["file"]) as image:
            assert from_png(image) == record
            pixels = np.asarray(image).astype(int)
        again = ("--class", record["class"], "--num", 1, "--seed", record["seed"])
        status, text = run(*again, "--out", f"again-{i}")
        assert status == 0, text
        (file,) = (tmp_path / f"again-{i}").glob("*.png")
        with Image.open(file) as image:
            assert "rerank" not in from_png(image)
            assert np.abs(np.asarray(image) - pixels).max() <= 1  # rounds by the batch


def test_a_sheet_says_it_too(run, clip):
    status, text = run("--class", "cat", "--num", 2, "--rerank", clip.source, "--out", "s.png")
    assert status == 0, text
    with Image.open("s.png") as image:
        record = from_png(image)
    assert [one["rerank"]["candidates"] for one in record["images"]] == [8, 8]
    assert record["settings"]["steps"] == 3 and "transformer" in record["model"]["sha256"]


def test_the_scorer_that_chose_is_told_apart_from_others(run, clip, tmp_path, capsys):
    arguments = ("--class", "cat,cow", "--num", 2, "--out", "best", "--candidates", 2)
    assert run(*arguments, "--rerank", clip.source)[0] == 0
    other = save_clip(tmp_path / "other", seed=1)
    for source, marked in ((other, False), (clip.source, True)):
        command = ["evaluate", "clip-score", "best", "--labels", "--clip", str(source)]
        assert main([*command, "--convention", "cosine"]) == 0
        assert ("NOT INDEPENDENT" in capsys.readouterr().out) == marked
    value = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["metrics"]
    records = json.loads((tmp_path / "best" / "metadata.json").read_text())["images"]
    mean = np.mean([record["rerank"]["cosine"] for record in records])
    # from the files, scaled by PIL, nearly what it was before there were files
    assert value["CLIP-score-cosine"]["value"] == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--candidates 4", "--candidates are for --rerank"),
        ("--rerank CLIP --candidates 1", "at least 2"),
        ("--rerank CLIP --trace", "take one"),
        ("--rerank nowhere", "nowhere"),
    ],
)
def test_mistakes_take_one_line(arguments, part, run, clip, tmp_path):
    status, text = run(*arguments.replace("CLIP", clip.source).split())
    assert status == 2 and part in text and text.count("\n") == 1, text
    assert not list(tmp_path.glob("*.png"))
