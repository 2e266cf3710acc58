"""`maskgit evaluate clip-score`: pairs joined by id, and every input that must be refused."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from conftest import pictures
from pictures import encoded, picture
from PIL import Image

from clip import CLIP
from maskgit.commands.main import main
from maskgit.common.folder import file_hash
from maskgit.evaluation.clip_model import open_clip_model, weights_file
from maskgit.metadata import to_png

TABLE = {f"{i:02}": f"caption number {i}" for i in range(12)}  # captions by stems


@pytest.fixture(scope="module")
def model(clip_folder):
    return CLIP.from_pretrained(clip_folder)


@pytest.fixture
def said(capsys, tmp_path, monkeypatch, clip_folder):
    """`said(*arguments)` runs `maskgit evaluate clip-score` in `tmp_path` with the tiny CLIP."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, clip=clip_folder):
        options = ["--clip", clip, *arguments]
        status = main(["evaluate", "clip-score", *map(str, options)])
        return status, "".join(reversed(capsys.readouterr()))  # what is printed at the end is last

    return run


def result(folder):
    return json.loads((folder / "metrics.json").read_text())


def rows(folder):
    return list(csv.DictReader((folder / "scores.csv").open()))


@pytest.fixture
def drawings(tmp_path):
    """12 drawings in a folder, one of another size, and a caption of each by its stem."""
    (tmp_path / "set").mkdir()
    for i, (_, content) in enumerate(pictures(12)):
        (tmp_path / "set" / f"{i:02}.png").write_bytes(content)
    with Image.open(tmp_path / "set" / "11.png") as image:
        image.convert("RGB").resize((50, 31)).save(tmp_path / "set" / "11.png")  # any size will do
    return dict(TABLE)


def expected_scores(model, tmp_path, captions, prefix=""):
    found = {}
    for stem, text in captions.items():
        with torch.no_grad(), Image.open(tmp_path / "set" / f"{stem}.png") as image:
            a = model.encode_image(model.preprocess([image.copy()]))
            b = model.encode_text(model.tokenize([prefix + text]))
        found[f"{stem}.png"] = (a * b).sum().item()
    return found


def write_table(path, captions, kind):
    """The captions in an order that is not that of the files."""
    pairs = list(captions.items())
    random.Random(3).shuffle(pairs)
    if kind == "json":
        path.write_text(json.dumps({f"{stem}.png": text for stem, text in pairs}))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"id": s, "text": t}) + "\n" for s, t in pairs))
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text(f"image{mark}caption\n" + "".join(f"{s}{mark}{t}\n" for s, t in pairs))


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv"])
def test_pairs_are_joined_by_id(kind, said, drawings, tmp_path, model):
    table = tmp_path / "set" / f"captions.{kind}"  # may lie among the images
    write_table(table, drawings, kind)
    status, text = said("set", "--captions", table, "--convention", "cosine", "--out", "out")
    assert status == 0, text
    assert text.splitlines()[-1] == "out/metrics.json"
    expected = expected_scores(model, tmp_path, drawings)
    found = {row["id"]: float(row["score"]) for row in rows(tmp_path / "out")}
    assert found == pytest.approx(expected, abs=1e-5)
    assert {r["id"]: r["caption"] for r in rows(tmp_path / "out")}["03.png"] == "caption number 3"
    value = result(tmp_path / "out")["metrics"]["CLIP-score-cosine"]
    assert value["value"] == pytest.approx(np.mean(list(expected.values())), abs=1e-5)
    assert value["n"] == 12 and value["interval"][0] < value["value"] < value["interval"][1]


def test_the_result_says_what_it_was_made_by(said, drawings, tmp_path, clip_folder, model):
    write_table(tmp_path / "captions.json", drawings | {"05": "word " * 40}, "json")
    status, text = said("set", "--captions", "captions.json", "--out", "out")
    assert status == 0, text
    found = result(tmp_path / "out")
    assert list(found["metrics"]) == ["CLIP-score-hessel"]
    how = found["clip_score"]
    assert (how["convention"], how["prefix"]) == ("hessel", "A photo depicts ")
    assert how["truncated"] == 1 and "1 texts are longer" in text
    assert how["not_independent"] is None and "NOT INDEPENDENT" not in text
    assert how["texts"]["captions sha256"] == file_hash(tmp_path / "captions.json")
    assert how["model"]["source"] == str(clip_folder)
    assert how["model"]["sha256"] == file_hash(clip_folder / "model.safetensors")
    assert how["model"]["recipe"]["text"]["context"] == model.config.text.context
    assert (
        found["dtype"] == "fp32" and found["versions"]["torch"] and found["images"]["count"] == 12
    )
    assert found["protocol"] is None
    assert any("is not ViT-B-32/openai" in reason for reason in found["not_comparable"])
    cosines = expected_scores(model, tmp_path, drawings, "A photo depicts ")
    scores = {r["id"]: float(r["score"]) for r in rows(tmp_path / "out")}
    del cosines["05.png"], scores["05.png"]
    assert scores == pytest.approx({k: max(2.5 * c, 0) for k, c in cosines.items()}, abs=1e-5)
    write_table(tmp_path / "captions.json", drawings, "json")
    said("set", "--captions", "captions.json", "--convention", "percent", "--out", "other")
    assert main(["evaluate", "compare", "out", "other"]) == 0


def test_several_captions_and_references(said, drawings, tmp_path):
    several = {stem: [text, "something else", "a third"] for stem, text in drawings.items()}
    (tmp_path / "captions.json").write_text(json.dumps(several))
    (tmp_path / "references.json").write_text(json.dumps({s: [t] for s, t in drawings.items()}))
    arguments = ("--captions", "captions.json", "--references", "references.json", "--out", "out")
    status, text = said("set", *arguments)
    assert status == 0, text
    values, table = result(tmp_path / "out")["metrics"], rows(tmp_path / "out")
    assert len(table) == 36 and values["CLIP-score-hessel"]["n"] == 12
    means = np.array([float(row["score"]) for row in table]).reshape(12, 3).mean(1)
    value = values["CLIP-score-hessel"]
    assert value["value"] == pytest.approx(means.mean(), abs=1e-6)
    assert value["standard_error"] == pytest.approx(means.std(ddof=1) / 12**0.5, abs=1e-6)
    for row in table[::3]:  # the first caption is its own reference: cosine 1
        score = float(row["score"])
        assert float(row["RefCLIPScore"]) == pytest.approx(2 * score / (score + 1), abs=1e-5)


def test_labels_of_class_folders_of_bundled_sets_and_of_what_was_sampled(said, tmp_path):
    for i, (_, content) in enumerate(pictures(6)):
        file = tmp_path / "classes" / ("cat-face", "heart")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "classes" / "notes.txt").write_text("beside the classes")
    status, text = said("classes", "--labels", "--template", "an emoji of a {}", "--out", "a")
    assert status == 0, text
    found = {row["id"].split("/")[0]: row["caption"] for row in rows(tmp_path / "a")}
    assert found == {"cat-face": "an emoji of a cat face", "heart": "an emoji of a heart"}
    assert result(tmp_path / "a")["class_counts"] == {"0": 3, "1": 3}
    assert "class prompts, no captions" in result(tmp_path / "a")["not_comparable"]

    status, text = said("emoji:heldout", "--labels", "--out", "b")
    assert status == 0, text
    assert result(tmp_path / "b")["metrics"]["CLIP-score-hessel"]["n"] == 189
    assert any(row["caption"].startswith("fruit / ") for row in rows(tmp_path / "b"))

    options = ["--class", "cat-face,heart", "--num", "2", "--steps", "1"]
    assert main(["sample", *options, "--out", "drawn"]) == 0
    status, text = said("drawn", "--labels", "--out", "c")
    assert status == 0, text
    captions = [row["caption"].split(" / ")[0] for row in rows(tmp_path / "c")]
    assert captions == ["cat face"] * 2 + ["heart"] * 2
    for file in (tmp_path / "drawn").glob("*.png"):  # without what is in the files themselves
        with Image.open(file) as image:
            file.write_bytes(encoded(image.convert("RGB")))
    status, text = said("drawn", "--labels", "--out", "c")
    assert (
        status == 0 and [row["caption"].split(" / ")[0] for row in rows(tmp_path / "c")] == captions
    )
    (tmp_path / "drawn" / "metadata.json").unlink()
    status, text = said("drawn", "--labels", "--out", "d")
    assert status == 2 and "000000_cat-face.png has no class" in text


def test_a_score_by_the_model_that_chose_is_marked(said, tmp_path, clip_folder):
    (tmp_path / "set").mkdir()
    for i in range(3):
        by = {"sha256": file_hash(clip_folder / "model.safetensors") if i == 2 else "0" * 64}
        record = {"class": "heart", "rerank": by}
        (tmp_path / "set" / f"{i}.png").write_bytes(to_png(picture(i), record))
    status, text = said("set", "--labels", "--out", "out")
    assert status == 0 and "NOT INDEPENDENT: reranked by the model that scores" in text
    found = result(tmp_path / "out")
    assert found["clip_score"]["not_independent"] == "reranked by the model that scores"
    assert "reranked by the model that scores" in found["not_comparable"]
    (tmp_path / "set" / "2.png").unlink()
    status, text = said("set", "--labels", "--out", "out")
    assert status == 0 and "reranked" not in text


def test_a_generator_is_scored_with_its_class_prompts(capsys, tmp_path, clip_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--reference emoji:heldout --extractor emoji --num 130 --runs 2 --steps 1 --out out"
    arguments = ["evaluate", "generator", *options.split(), "--clip-score", str(clip_folder)]
    assert main(arguments) == 0, capsys.readouterr()
    text = "".join(capsys.readouterr())
    found = result(tmp_path / "out")
    value = found["metrics"]["CLIP-score-hessel"]
    assert value["over"] == "2 runs" and "CLIP-score-hessel" in text
    assert found["clip_score"]["convention"] == "hessel"
    assert found["clip_score"]["model"]["sha256"] == file_hash(clip_folder / "model.safetensors")
    # its images carry their classes, so that the other command finds the same
    folder = tmp_path / "out" / "images" / "run-0"
    again = ["evaluate", "clip-score", folder, "--labels", "--clip", clip_folder, "--out", "again"]
    assert main(list(map(str, again))) == 0
    other = result(tmp_path / "again")["metrics"]["CLIP-score-hessel"]["value"]
    assert other == pytest.approx(value["runs"][0], abs=1e-3)


# Bad input


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        ({k: v for k, v in TABLE.items() if k != "03"}, ["no caption", "03.png"]),
        (TABLE | {"set/03.png": "again"}, ["03.png", "twice"]),
        (TABLE | {"03": " "}, ["03", "empty"]),
        (TABLE | {"03": []}, ["03", "empty"]),
        (TABLE | {"nobody": "text"}, ["nobody", "no such image"]),
        ('{"03": "text", "03": "again"}', ["03", "twice"]),
        ("{", ["not JSON"]),
    ],
)
def test_tables_that_do_not_fit_the_images(table, parts, said, drawings, tmp_path):
    content = table if isinstance(table, str) else json.dumps(table)
    (tmp_path / "captions.json").write_text(content)
    status, text = said("set", "--captions", "captions.json")
    (line,) = [line for line in text.splitlines() if line.startswith("maskgit: ")]
    assert status == 2 and "captions.json" in line
    assert all(part in line for part in parts), line
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("set", "--captions --labels is required"),
        ("set --labels --captions captions.json", "not allowed with"),
        ("set --captions nowhere.json", "no file nowhere.json: check the path"),
        ("set --captions captions.txt", "come as .csv"),
        ("set --captions captions.json --convention hesel", "did you mean 'hessel'"),
        ("set --captions captions.json --template {}", "give it with --labels"),
        ("set --captions captions.json --references nowhere.json", "nowhere.json"),
        (
            "set --captions captions.json --references captions.json --convention cosine",
            "hessel alone",
        ),
        ("set --labels", "has no class"),
        ("nowhere --labels", "nowhere is no folder"),
        ("empty --labels", "it is empty"),
        ("emoji --labels --template emoji", "needs {} once"),
        ("set --captions captions.json --clip nowhere", "nowhere"),
        ("set --captions captions.json --out captions.json", "captions.json"),
    ],
)
def test_mistakes_take_one_line(arguments, part, said, drawings, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(drawings))
    (tmp_path / "captions.txt").write_text("a\n")
    (tmp_path / "empty").mkdir()
    status, text = said(*arguments.split())
    lines = [line for line in text.splitlines() if line.startswith("maskgit: ")]
    assert status == 2 and len(lines) == 1 and part in lines[0], text
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"no image", "cannot be used"),
        (b"", "empty"),
        (encoded(picture(1))[:-40], "cannot be used"),
        (encoded(picture(1, (40, 7))), "too small: 40x7"),
    ],
)
def test_images_that_cannot_be_scored_are_named(content, part, said, drawings, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(drawings))
    (tmp_path / "set" / "07.png").write_bytes(content)
    status, text = said("set", "--captions", "captions.json")
    assert status == 2 and "07.png" in text and part in text, text
    assert not (tmp_path / "evaluation").exists()


def test_the_hash_is_of_the_file_that_is_loaded(tmp_path, clip_folder):
    device = torch.device("cpu")
    own = clip_folder / "model.safetensors"
    inside = tmp_path / "pipeline" / "clip"
    inside.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (inside / name).write_bytes((clip_folder / name).read_bytes())
    for source in (clip_folder, inside.parent, own):
        assert open_clip_model(str(source), device).sha256 == file_hash(own)
    both = tmp_path / "both"  # as LAION's repositories are, of which OpenCLIP's file is taken
    both.mkdir()
    for name in ("open_clip_config.json", "open_clip_pytorch_model.bin", "config.json"):
        (both / name).touch()
    (both / "pytorch_model.bin").touch()
    assert weights_file(str(both)).name == "open_clip_pytorch_model.bin"
