"""The card that `maskgit push` writes: numbers, commands, settings, licence, and the samples."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import one_line
from PIL import Image
from test_push import NAME, PARTS, announced, dry, model
from tiny_clip import save_clip
from tiny_published import (
    flax_bytes,
    llamagen_tokenizer,
    official_tokenizer,
    official_transformer,
    put,
)

from maskgit import card, card_numbers
from maskgit.commands.main import dispatch
from maskgit.common import UserError
from maskgit.common.folder import BUNDLED, file_hash
from maskgit.importing import import_files
from maskgit.metadata import from_png

__all__ = ["model"]  # a fixture


def front(text):
    return yaml.safe_load(text.split("---")[1])


def test_numbers_of_another_model(model, tmp_path):
    result = measured(model, "tokenizer")
    result["model"]["sha256"]["vqgan"] = 64 * "0"
    file = write(tmp_path / "metrics.json", result)
    with pytest.raises(UserError) as error:
        dry(model, "--license", "mit", "--metrics", file)
    one_line(error, file, "measured another vqgan")
    write(file, measured(model, "tokenizer") | {"command": "images"})
    with pytest.raises(UserError) as error:
        dry(model, "--license", "mit", "--metrics", file)
    one_line(error, file, "does not know whose images")
    with pytest.raises(UserError) as error:
        dry(model, "--license", "mit", "--metrics", tmp_path / "lost")
    one_line(error, "no file", "lost")


def measured(folder, command, **more):
    """What `maskgit evaluate` leaves of the model in a folder."""
    hashes = {
        kind: file_hash(folder / kind / "model.safetensors") for kind in ("vqgan", "transformer")
    }
    some = {"name": "/data/photos", "hash": 64 * "b", "count": 500, "size": [64, 64]}
    some |= {"resized": True, "jpeg": 0, "kind": "files"}
    return {
        "command": command,
        "metrics": {"PSNR (dB)": {"value": 21.5}, "FD": {"value": 3.25, "over": "3 runs"}},
        "model": {"source": "run/export", "sha256": hashes},
        "images": some | {"runs": 3},
        "reference": some,
        "extractor": {"name": "emoji", "sha256": 64 * "c", "tf32": False},
        "labels": "balanced",
        "seeds": [7, 1506],
        "dtype": "fp32",
        "gpu": None,
        "processor": "a processor",
        "versions": {"maskgit": "0.1", "torch": "2.11"},
        "protocol": None,
        "not_comparable": ["n=500"],
        **more,
    }


def write(file, result):
    file.write_text(json.dumps(result))
    return file


def test_the_numbers_and_the_commands_that_give_them(model, tmp_path, capsys):
    own = card.read_model(model).pipe.settings({})
    settings = {**own, "steps": 5, "temperature": [1.0, 0.5]}
    file = write(tmp_path / "metrics.json", measured(model, "generator", settings=settings))
    (model / "evaluation").mkdir()
    write(model / "evaluation" / "metrics.json", measured(model, "tokenizer"))
    dry(model, "--license", "mit", "--metrics", tmp_path)
    text = capsys.readouterr().out
    assert text.count("| PSNR (dB) | 21.5 |  |") == text.count("| FD | 3.25 | 3 runs |") == 2
    assert text.count("NOT COMPARABLE: n=500.") == 2
    assert "against photos (500 images, sha256 `bbbbbbbbbbbbbbbb...`)" in text
    assert (
        "maskgit evaluate generator --model user/mine --reference photos --extractor emoji "
        "--num 500 --runs 3 --labels balanced --seed 7 --dtype fp32 --steps 5 --temperature 1.0,0.5"
    ) in text
    assert (
        "maskgit evaluate tokenizer --vqgan user/mine --data photos --extractor emoji --size 64\n"
    ) in text
    paths = [name for name in announced(text) if name.endswith("metrics.json")]
    assert paths[0] == "evaluation/metrics.json"
    assert re.fullmatch(r"metrics/generator-[0-9a-f]{8}/metrics.json", paths[1])
    assert announced(text)[paths[1]] == file.stat().st_size
    assert all(f"note: {path} names /data/photos" in text for path in paths)
    assert "/data/" not in text.partition("note:")[0]


def test_the_bundled_model(capsys):
    model = card.read_model(BUNDLED["emoji"])
    text = card.card(model, NAME, card.licences(model, "apache-2.0"), [])
    about = front(text)
    assert about["license"] == "apache-2.0" and about["library_name"] == "maskgit"
    assert about["pipeline_tag"] == "unconditional-image-generation"
    assert "class-conditional-image-generation" in about["tags"]
    assert "images of 64 x 64 pixels of 99 classes, in 8 parallel steps" in text
    for kind, part in model.parts.items():
        count = sum(p.numel() for p in part.parameters()) / 1e6
        [row] = re.findall(rf"\| `{kind}/` \|.*", text)
        assert f"| {count:.1f} million |" in row and model.hashes[kind][:16] in row
    settings = json.loads((BUNDLED["emoji"] / "model_index.json").read_text())["sampling"]
    assert f"temperature {settings['temperature']}" in text and "guidance 0" not in text
    assert "musical-instrument" in text.partition("## Classes")[2]


def test_the_sheet_shows_what_its_command_gives(model, tmp_path, monkeypatch):
    pipe = card.read_model(model).pipe
    sheet = Image.open(io.BytesIO(card.sample_sheet(pipe, NAME)))
    assert from_png(sheet)["model"] == NAME
    command = re.search(r"^maskgit (sample .*)$", card.showcase(pipe, NAME), re.MULTILINE)[1]
    assert "--class cat 'red dog' --num 1 --seed 0" in command
    (tmp_path / "user").mkdir()
    model.rename(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    dispatch(shlex.split(command))
    assert Image.open(tmp_path / "samples.png").tobytes() == sheet.tobytes()


def test_an_imported_model(tmp_path, capsys):
    files = {
        "tokenizer_imagenet256_checkpoint": flax_bytes(official_tokenizer()),
        "maskgit_imagenet256_checkpoint": flax_bytes(official_transformer(side=16)),
    }
    paths = [put(tmp_path / name, content) for name, content in files.items()]
    import_files(paths, tmp_path / "maskgit256", say=lambda line: None)
    model = card.read_model(tmp_path / "maskgit256")
    text = card.card(model, NAME, card.licences(model, None), [])
    assert front(text)["license"] == "apache-2.0"
    for name, path in zip(files, paths, strict=True):
        assert f"imported from `{name}`, sha256 `{file_hash(Path(path))}`" in text
    assert "licence there: Apache-2.0 (google-research/maskgit)" in text
    assert "1,000: tench, goldfish" in text and "and 900 more in `labels.json`" in text
    assert "without guidance" in text
    assert "Reached elsewhere, not measured here: FID 6.18, Inception Score 182.1" in text
    assert str(tmp_path) not in text
    with pytest.raises(UserError) as error:
        dry(tmp_path / "maskgit256", "--license", "mit")
    one_line(error, "source.json says apache-2.0", "leave it out")

    (tmp_path / "maskgit256" / "labels.json").write_text("[]")
    with pytest.raises(UserError) as error:
        dry(tmp_path / "maskgit256")
    one_line(error, "is not sent: labels.json", "sha256")


def test_parts_alone_and_licences_that_differ(tmp_path, capsys):
    import_files(
        [put(tmp_path / "vq_ds16_c2i.pt", {"model": llamagen_tokenizer()})],
        tmp_path / "two",
        say=lambda line: None,
    )
    dry(tmp_path / "two")
    text = capsys.readouterr().out
    assert front(text) == {
        "license": "mit",
        "library_name": "maskgit",
        "tags": ["maskgit", "vqgan"],
    }
    assert 'VQGAN.from_pretrained("user/mine")' in text and "samples.png" not in text
    assert announced(text).keys() == {"README.md", "source.json", *PARTS[-2:]}

    save_clip(tmp_path / "two" / "clip")
    with pytest.raises(UserError) as error:
        dry(tmp_path / "two")
    one_line(error, "nothing says the licence of clip,")
    dry(tmp_path / "two", "--license", "cc-by-4.0")
    text = capsys.readouterr().out
    assert front(text)["license"] == "other"
    assert front(text)["license_link"] == "README.md#licence-and-source"
    assert "- `clip/`: cc-by-4.0; trained" in text and "- `vqgan/`: mit; LlamaGen" in text

    save_clip(tmp_path / "one" / "clip")
    dry(tmp_path / "one", "--license", "mit")
    assert front(capsys.readouterr().out)["pipeline_tag"] == "zero-shot-image-classification"


def test_names_of_extractors_become_options():
    option = card_numbers.extractor_option
    assert option("inception") == "inception" and option("clip") == "clip"
    assert option("clip-ViT-B-32-openai") == "clip:ViT-B-32/openai"
