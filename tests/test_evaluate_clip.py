"""`maskgit evaluate clip`: what it measures and writes, and what it refuses before the work."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image

from clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from clip.recipes import recipes
from clip.zero_shot import imagenet, wilson
from maskgit.commands.main import main
from maskgit.common import UserError
from maskgit.evaluation.clip_inputs import match_labels, resolve
from maskgit.evaluation.clip_model import open_clip_model
from maskgit.evaluation.clip_score import open_pictures
from maskgit.evaluation.clip_tasks import expected, features_of

COLOURS = {"red-ball": (220, 40, 40), "green-ball": (30, 180, 60), "sea": (40, 80, 220)}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny CLIP with random weights."""
    torch.manual_seed(0)
    image = ImageConfig(size=[32, 32], patch=16, width=32, depth=1, heads=2)
    text = TextConfig(merges=500, context=24, width=32, depth=1, heads=2)
    folder = tmp_path_factory.mktemp("model")
    CLIP(CLIPConfig(embed=8, image=image, text=text)).save_pretrained(folder)
    return folder


def colours(root, each, seed):
    """A folder for each class, images of its colour with noise, and two captions beside each."""
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.array(colour) + random.normal(0, 60, (40, 48, 3))
            file = root / name / f"{i:03}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
            file.with_suffix(".txt").write_text(f"{name} number {i}\nview {i} of a {name}\n")
    return root


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return colours(root / "test", 8, 0), colours(root / "train", 6, 1)


@pytest.fixture
def said(capsys, tmp_path, monkeypatch, model):
    """`said(*arguments)` runs the command in `tmp_path`: its status, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["evaluate", "clip", "--clip", str(model), *map(str, arguments)])
        return status, "".join(capsys.readouterr())

    return run


def test_everything_of_a_folder(said, sets, tmp_path, model):
    test, train = sets
    arguments = ["--data", test, "--train", train, "--shots", "1,4,64", "--out", "out"]
    status, text = said(*arguments)
    assert status == 0, text
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    metrics = found["metrics"]
    for way in ("bare name", "one template", "ensemble"):
        top1, top5 = (metrics[f"zero-shot top-{k}, {way}"] for k in (1, 5))
        assert top1["n"] == 24 and 0 <= top1["value"] <= top5["value"] == 1  # of 3 classes
        assert (top1["low"], top1["high"]) == pytest.approx(wilson(top1["value"], 24))
        # equally many images a class: the mean of classes is the same number
        assert metrics[f"zero-shot mean of classes, {way}"] == pytest.approx(top1)
    for way in ("image to text", "text to image"):
        recalls = [metrics[f"{way} recall@{k}"]["value"] for k in (1, 5, 10)]
        assert recalls == sorted(recalls) and metrics[f"{way} recall@1"]["n"] == 24
    assert metrics["text to image recall@5"]["chance"] == pytest.approx(5 / 24)
    # colours are easily told apart, by a probe on random features too
    assert metrics["probe top-1"]["value"] > 0.8 and found["clip"]["probe"]["C"] > 0
    assert metrics["1-shot top-1"]["images"] == 3 and metrics["4-shot top-1"]["images"] == 12
    assert metrics["4-shot top-1"]["value"] > 0.5 and len(metrics["4-shot top-1"]["runs"]) == 3
    assert "64-shot top-1" not in metrics
    assert found["left_out"] == {"64 shots": f"no class of {train} has more than 6 images"}
    assert "left out   64 shots" in text
    assert found["command"] == "clip" and found["format_version"] == 1
    assert found["clip"]["names"] == ["green ball", "red ball", "sea"]
    assert list(found["clip"]["templates"]) == ["bare name", "one template", "ensemble"]
    assert len(found["clip"]["templates"]["ensemble"]) == 7
    assert found["clip"]["captions"]["count"] == 48 and found["clip"]["published_top1"] is None
    assert found["clip"]["model"]["sha256"] == open_clip_model(str(model), "cpu").sha256
    assert found["clip"]["model"]["recipe"]["embed"] == 8
    assert found["images"]["hash"] != found["reference"]["hash"]
    assert found["class_counts"] == {"0": 8, "1": 8, "2": 8} and found["versions"]["torch"]
    assert Image.open(tmp_path / "out" / "few_shot.png").width > 500
    assert "\nout/few_shot.png\nout/metrics.json\n" in text and "published" not in text
    assert "0 (zero-shot)" in text and "\x1b" not in text

    # features are kept, and the numbers are the same
    kept = list((tmp_path / "out" / "features").iterdir())
    times = [file.stat().st_mtime_ns for file in kept]
    status, text = said(*arguments, "--task", "few-shot")
    again = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    assert status == 0 and [file.stat().st_mtime_ns for file in kept] == times
    assert again["4-shot top-1"] == metrics["4-shot top-1"] and "probe top-1" not in again
    assert again["zero-shot top-1, ensemble"] == metrics["zero-shot top-1, ensemble"]

    # other results stand beside it
    assert main(["evaluate", "compare", "out", "out"]) == 0


def test_the_bundled_set(said, tmp_path):
    status, text = said("--data", "emoji:heldout", "--task", "zero-shot,retrieval", "--out", "out")
    assert status == 0, text
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["tasks"] == ["zero-shot", "retrieval"] and found["left_out"] == {}
    assert found["reference"] is None and len(found["clip"]["names"]) == 99
    assert any("cat face" in names for names in found["clip"]["names"])
    assert sum(found["class_counts"].values()) == 189
    assert found["clip"]["captions"]["count"] == 189  # the names alone
    chance = found["metrics"]["image to text recall@10"]["chance"]
    assert chance == pytest.approx(10 / 189)
    assert not (tmp_path / "out" / "few_shot.png").exists()


def test_names_templates_and_captions_of_ones_own(said, sets, tmp_path):
    names = {"sea": "ocean", "red-ball": "apple", "green-ball": "pear"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "prompts.txt").write_text("my {}.\n\nan old {}.\n")
    rows = {f"{name}/{i:03}.png": f"{name} {i} " * 20 for name in COLOURS for i in range(8)}
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    options = "--names names.json --templates prompts.txt --captions captions.json --out own"
    status, text = said("--data", sets[0], *options.split())
    assert status == 0, text
    found = json.loads((tmp_path / "own" / "metrics.json").read_text())
    assert found["clip"]["names"] == ["pear", "apple", "ocean"]
    assert found["clip"]["templates"] == {
        "bare name": ["{}"],
        "one template": ["my {}."],
        "ensemble": ["my {}.", "an old {}."],
    }
    assert found["clip"]["truncated"] == 24 and "24 texts are longer" in text
    assert found["clip"]["captions"] == {
        "count": 24,
        "sha256": found["clip"]["captions"]["sha256"],
    }
    assert set(found["left_out"]) == {"probe", "few-shot"}
    assert "left out   probe: no images to fit it on: give --train SET" in text


@pytest.fixture
def bad(tmp_path, sets):
    """Files with mistakes, and sets that lack something, in `tmp_path`."""
    for name, text in {
        "two.txt": "a\nb\n",
        "unknown.json": '{"sea": "a", "red-ball": "b", "gren-ball": "c"}',
        "missing.json": '{"sea": "a", "red-ball": "b"}',
        "empty.json": '["a", "", "c"]',
        "broken.json": "[",
        "number.json": "3",
        "nothing.txt": "\n",
        "plain.txt": "a {}\nwithout\n",
        "object.json": '{"a": "a {}"}',
        "twice.json": '{"000": "a"}',
        "few.json": '{"sea/000.png": "a caption"}',
    }.items():
        (tmp_path / name).write_text(text)
    flat = tmp_path / "flat"
    flat.mkdir()
    file = sets[0] / "sea" / "000.png"
    (flat / "a.png").write_bytes(file.read_bytes())
    (tmp_path / "lions" / "lion").mkdir(parents=True)
    (tmp_path / "lions" / "lion" / "a.png").write_bytes(file.read_bytes())
    (tmp_path / "torn" / "sea").mkdir(parents=True)
    (tmp_path / "torn" / "sea" / "a.png").write_bytes(file.read_bytes()[:40])
    (tmp_path / "copy").symlink_to(sets[0])
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--data DATA --names two.txt", "two.txt has 2 names, DATA 3 classes"),
        ("--data DATA --names imagenet", "imagenet has 1000 names"),
        ("--data DATA --names unknown.json", "did you mean 'green-ball'"),
        ("--data DATA --names missing.json", "no name for 1 classes (green-ball"),
        ("--data DATA --names empty.json", "empty or no text"),
        ("--data DATA --names broken.json", "is not JSON"),
        ("--data DATA --names number.json", "holds no texts"),
        ("--data DATA --names nothing.txt", "holds no texts"),
        ("--data DATA --names nowhere.txt", "no file nowhere.txt"),
        ("--data DATA --templates plain.txt", "'without' needs {} once"),
        ("--data DATA --templates imagnet", "imagenet or imagenet7"),
        ("--data DATA --templates object.json", "a JSON list"),
        ("--data DATA --task zero-short", "did you mean 'zero-shot'"),
        ("--data DATA --task probe", "give --train SET"),
        ("--data DATA --train DATA", "is what is measured"),
        ("--data DATA --train copy", "the very images of DATA"),
        ("--data DATA --train lions", "has a class 'lion', DATA does not"),
        ("--data DATA --train flat", "--train flat has no classes"),
        ("--data DATA --shots 0", "at least 1"),
        ("--data DATA --captions twice.json", "several images"),
        ("--data DATA --captions few.json", "has no caption for the image"),
        ("--data lions --task retrieval", "no caption"),
        ("--data flat --task zero-shot", "flat has no classes"),
        ("--data flat --names two.txt", "flat has no classes"),
        ("--data flat", "neither classes nor captions"),
        ("--data nowhere", "nowhere is no folder"),
        ("--data torn", "a.png cannot be used"),
        ("--data DATA --clip nowhere", "no model at nowhere"),
        ("--data DATA --out two.txt/out", "cannot write"),
        ("", "--data"),
    ],
)
def test_mistakes_are_told_before_the_work(arguments, why, said, bad, sets, monkeypatch):
    def never(*_):
        raise AssertionError("encoded something")

    monkeypatch.setattr(CLIP, "encode_image", never)
    data = str(sets[0])
    status, text = said(*arguments.replace("DATA", data).split())
    assert status == 2 and why.replace("DATA", data) in text, text
    assert text.rstrip("\n").splitlines()[-1].startswith("maskgit: ")
    assert not (bad / "evaluation").exists()


def test_labels_are_matched_by_name(tmp_path, sets):
    part = tmp_path / "part"
    (part / "sea").mkdir(parents=True)
    (part / "sea" / "a.png").write_bytes((sets[0] / "sea" / "000.png").read_bytes())
    labels = match_labels(open_pictures(str(part)), open_pictures(str(sets[0])))
    assert labels.tolist() == [2]


def test_imagenets_names_go_by_the_order_of_the_classes(tmp_path, sets, model):
    pixels = (sets[0] / "sea" / "000.png").read_bytes()
    for i in range(1000):
        folder = tmp_path / "imagenet" / f"n{i:08}"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(pixels)
    inputs = resolve(str(tmp_path / "imagenet"), names="imagenet", prompts="imagenet")
    assert inputs.names == imagenet()["names"] and inputs.tasks == ["zero-shot"]
    assert inputs.ways["one template"].templates == ["a photo of a {}."]
    assert len(inputs.ways["ensemble"].templates) == 80
    clip = open_clip_model(str(model), "cpu")
    assert expected(clip, inputs) is None
    clip.model.config.recipe = "ViT-L-14/openai"
    assert expected(clip, inputs) is None and clip.name == str(model)  # the name alone is nothing
    clip = replace(clip, sha256=recipes()["ViT-L-14/openai"].sha256.ljust(64, "0"))
    assert expected(clip, inputs) == pytest.approx(0.753) and clip.name == "ViT-L-14/openai"
    inputs.names = inputs.names[::-1]
    assert expected(clip, inputs) is None


def test_features_belong_to_weights_recipe_and_images(tmp_path, sets, model):
    clip, pictures = open_clip_model(str(model), "cpu"), open_pictures(str(sets[1]))
    first = features_of(clip, pictures, tmp_path / "kept")
    assert first.shape == (18, 8)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(18))
    assert torch.equal(features_of(clip, pictures, tmp_path / "kept"), first)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    clip.model.config.mean = [0.5, 0.5, 0.5]
    assert not torch.equal(features_of(clip, pictures, tmp_path / "kept"), first)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_features_that_are_not_finite_are_refused(tmp_path, sets, model):
    clip = open_clip_model(str(model), "cpu")
    with torch.no_grad():
        clip.model.visual.conv1.weight[0] = torch.nan
    with pytest.raises(UserError) as error:
        features_of(clip, open_pictures(str(sets[1])), tmp_path)
    one_line(error, "not finite", "weights")
    assert list(tmp_path.iterdir()) == []
