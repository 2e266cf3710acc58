"""`maskgit sample` and `maskgit edit`, mostly within this process, on a tiny model."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from runs import Started
from test_pipeline import NAMES, SIZE, tiny_transformer, tiny_vqgan

from maskgit.commands.main import main
from maskgit.common.folder import file_hash
from maskgit.pipeline import Pipeline

WIDTH, HEIGHT = SIZE[1], SIZE[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    showcase = {"steps": 3, "showcase": ["cow", "cat"]}
    Pipeline(tiny_vqgan(), tiny_transformer(), NAMES, showcase).save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """`run(*arguments)` in an empty folder: the exit status, and the lines of stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments):
        options = [] if "--model" in arguments else ["--model", model]
        status = main([str(a) for a in (command, *arguments, *options)])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


def photo(path, mode="RGB", size=(41, 37)):
    """Save a picture of noise; its pixels as they are in the file."""
    bands = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)
    return pixels


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- sample


def test_without_arguments_the_showcase(run, tmp_path):
    status, out, _ = run("sample")
    assert status == 0
    assert out[-1] == "samples.png"
    assert out[0].startswith("8 images in ") and "images/s" in out[0]
    assert files(tmp_path) == ["samples.png"]
    with Image.open("samples.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 8 * WIDTH


def test_a_folder_of_images_with_their_origin(run, model, tmp_path):
    where = tmp_path / "deep" / "images"
    arguments = ("--class", "cat,3", "7", "--num", 2, "--seed", 10, "--batch-size", 4)
    status, out, _ = run("sample", *arguments, "--steps", 2, "--guidance", 1, "--out", where)
    assert status == 0 and out[-1] == str(where)
    metadata = json.loads((where / "metadata.json").read_text())["images"]
    assert [(m["class"], m["label"], m["seed"]) for m in metadata] == [
        ("cat", 0, 10), ("cat", 0, 11), ("cow", 3, 12), ("cow", 3, 13), ("7", 2, 14), ("7", 2, 15)
    ]  # fmt: skip
    assert files(where) == sorted([m["file"] for m in metadata] + ["metadata.json"])
    assert sorted(os.listdir(tmp_path)) == ["deep"] and os.listdir(tmp_path / "deep") == ["images"]
    weights = metadata[0]["model"]["sha256"]
    assert weights["transformer"] == file_hash(model / "transformer" / "model.safetensors")

    # The record is enough to make the image again.
    pipe = Pipeline.from_pretrained(model, "cpu", metadata[3]["settings"].pop("dtype"))
    assert str(pipe.device) == metadata[3]["settings"].pop("device")
    again = pipe.sample(metadata[3]["class"], seed=13, **metadata[3]["settings"])
    with Image.open(where / metadata[3]["file"]) as picture:
        kept = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert ((again[0] * 255) - kept).abs().max() < 0.6

    status, _, err = run("sample", "--out", where)
    assert status == 2 and "not empty" in err[0]


def test_a_trace_of_every_step(run, tmp_path):
    status, out, _ = run("sample", "--class", "all", "--num", 1, "--trace", "--out", "s.png")
    assert status == 0 and out[-1] == "s.png"
    assert files(tmp_path) == ["s.png", "s_trace.gif", "s_trace.png"]
    with Image.open("s_trace.gif") as gif:
        assert gif.n_frames == 3
    with Image.open("s_trace.png") as strip:
        assert strip.height > len(NAMES) * HEIGHT and strip.width > 3 * WIDTH


def test_mistakes_in_sampling_take_one_line(run, tmp_path):
    photo("file.png")
    kept = (tmp_path / "file.png").read_bytes()
    for arguments, part in [
        (("--class", "catt"), "'cat'"),
        (("--class", "cat,99"), "0 to 3"),
        (("--class", ","), "--class"),
        (("--num", 0), "--num"),
        (("--num", "many"), "--num"),
        (("--steps", 0), "--steps"),
        (("--temperature", "hot"), "--temperature"),
        (("--temperature", "1,2,3"), "--temperature"),
        (("--temperature", -1), "temperature"),
        (("--top-p", 2), "top-p"),
        (("--schedule", "cosin"), "'cosine'"),
        (("--guidance-schedule", "lin"), "'linear'"),
        (("--guidanse", 2), "--guidance"),
        (("--device", "cuda:99"), "GPU"),
        (("--device", "gpu"), "'cpu'"),
        (("--dtype", "fp64"), "dtype"),
        (("--model", "nowhere"), "nowhere"),
        (("--model", "file.png"), "file.png"),
        (("--model", "."), "model_index.json"),
        (("--out", "file.png/s.png"), "cannot write"),
        (("--out", "file.png/folder"), "cannot write"),
        (("--out", "s.jpg"), ".png"),
    ]:
        status, out, err = run("sample", *arguments)
        assert status == 2 and len(err) == 1 and out == [], (arguments, out, err)
        assert part in err[0], (arguments, err)
    assert files(tmp_path) == ["file.png"] and (tmp_path / "file.png").read_bytes() == kept


def test_an_interrupted_run_leaves_nothing(model, tmp_path):
    words = ["sample", "--model", model, "--num", "20000", "--batch-size", "1", "--out", "many"]
    started = Started(tmp_path, words)
    while not list(tmp_path.glob(".maskgit-*/*.png")):  # images are being written
        assert started.lives
        time.sleep(0.1)
    started.send(signal.SIGINT)
    status, _, err = started.wait()
    assert status == 130 and "Traceback" not in err
    assert files(tmp_path) == [] and os.listdir(tmp_path) == []


# ---------------------------------------------------------------- edit


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_edit_keeps_the_file_s_pixels_outside_the_box(run, tmp_path, mode):
    before = photo("photo.png", mode)
    arguments = ("photo.png", "--box", "5,6,20,9", "--class", "cow", "--num", 3, "--out", "e.png")
    status, out, _ = run("edit", *arguments)
    assert status == 0 and out[-1] == "e.png"
    assert files(tmp_path) == ["e.png", "e_1.png", "e_2.png", "e_3.png", "photo.png"]
    inside = np.zeros(before.shape[:2], bool)
    inside[6:15, 5:25] = True
    variants = []
    for i in (1, 2, 3):
        with Image.open(f"e_{i}.png") as picture:
            assert picture.mode == ("RGBA" if mode == "RGBA" else "RGB")
            variants.append(np.asarray(picture))
        assert (variants[-1][~inside] == before[~inside]).all()  # grey: in all three bands
        assert (variants[-1][inside] != before[inside]).mean() > 0.5
    assert (variants[0] != variants[1]).any() and (variants[1] != variants[2]).any()
    if mode == "RGBA":
        assert (variants[0][inside][:, 3] == 255).all()


def test_the_command_edits_as_the_pipeline_does(run, model):
    before = photo("photo.png", size=(150, 130))
    assert run("edit", "photo.png", "--box", "70,55,40,20", "--num", 2, "--seed", 3)[0] == 0
    pipe = Pipeline.from_pretrained(model, "cpu")
    images = torch.from_numpy(before).permute(2, 0, 1)[None] / 255
    mask = torch.zeros(1, 1, 130, 150)
    mask[..., 55:75, 70:110] = 1
    expected = pipe.inpaint(images, mask, seed=4)[0]
    with Image.open("edit_2.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert (pixels - 255 * expected).abs().max() < 0.6


def test_a_mask_file_of_any_kind(run):
    before = photo("photo.png")
    for name, outside, inside in [("L", 0, 255), ("RGBA", (255, 255, 255, 0), (255,) * 4)]:
        mask = Image.new(name, (41, 37), outside)
        mask.paste(inside, (30, 20, 41, 37))
        mask.save("mask.png")
        status, _, _ = run("edit", "photo.png", "--mask", "mask.png", "--num", 1, "--resize")
        assert status == 0
        with Image.open("edit_1.png") as picture:
            changed = (np.asarray(picture) != before).any(-1)
        assert (
            changed[20:, 30:].mean() > 0.9 and not changed[:20].any() and not changed[:, :30].any()
        )


def test_outpainting_keeps_the_picture(run):
    before = photo("photo.png")
    status, out, _ = run("edit", "photo.png", "--outpaint", "3,0,20,7", "--num", 1)
    assert status == 0 and "64 x 44" in out[0]
    with Image.open("edit_1.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (37 + 7, 3 + 41 + 20, 3)
    assert (pixels[:37, 3:44] == before).all()


def test_pictures_of_all_kinds_are_opened(run):
    pixels = photo("photo.png", size=(24, 16))
    picture = Image.fromarray(pixels)
    picture.quantize(16).save("palette.png")
    picture.quantize(16).save("see-through.png", transparency=0)
    picture.convert("1").save("bits.png")
    picture.convert("CMYK").save("cmyk.jpg")
    deep = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 150
    Image.fromarray(deep).save("deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    picture.save("turned.png", exif=turned)
    for name, mode, size in [
        ("palette.png", "RGB", (24, 16)),
        ("see-through.png", "RGBA", (24, 16)),
        ("bits.png", "RGB", (24, 16)),
        ("cmyk.jpg", "RGB", (24, 16)),
        ("deep.png", "RGB", (24, 16)),
        ("turned.png", "RGB", (16, 24)),
    ]:
        status, _, err = run("edit", name, "--box", "0,0,4,4", "--num", 1, "--steps", 1)
        assert status == 0, err
        with Image.open("edit_1.png") as edited:
            assert edited.mode == mode and edited.size == size
            shown = np.asarray(edited)
        if name == "deep.png":
            assert (shown[8:, :, 0] == (deep[8:] / 257).astype(np.uint8)).all()
        elif name == "turned.png":
            assert (shown[8:] == np.rot90(pixels, -1)[8:]).all()
        else:
            with Image.open(name) as original:
                assert (shown[8:] == np.asarray(original.convert(mode))[8:]).all()


def test_mistakes_in_editing_take_one_line(run, tmp_path):
    photo("photo.png")
    photo("edit_1.png")
    Image.new("L", (41, 37)).save("black.png")
    Image.new("L", (41, 36), 255).save("small.png")
    whole = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("1", (10_000, 6_000)).save("huge.png")
    before = files(tmp_path)
    box = ("--box", "0,0,4,4")
    for arguments, part in [
        (("photo.png",), "--box"),
        (("photo.png", *box, "--outpaint", "1,1,1,1"), "--box"),
        (("photo.png", "--box", "30,0,20,5"), "41 x 37"),
        (("photo.png", "--box", "5,5,0,3"), "empty"),
        (("photo.png", "--box=-1,0,4,4"), "--box"),
        (("photo.png", "--box", "1,2,3"), "--box"),
        (("photo.png", "--outpaint", "0,0,0,0"), "nothing"),
        (("photo.png", "--outpaint", "0,0,9000000,0"), "pixels"),
        (("photo.png", "--mask", "black.png"), "nothing"),
        (("photo.png", "--mask", "small.png"), "41 x 36"),
        (("photo.png", "--mask", "text.png"), "text.png"),
        (("photo.png", "--mask", "none.png"), "none.png"),
        (("none.png", *box), "none.png"),
        ((".", *box), "cannot be opened"),
        (("text.png", *box), "text.png"),
        (("empty.png", *box), "empty.png"),
        (("cut.png", *box), "cut.png"),
        (("huge.png", *box), "pixels"),
        (("photo.png", *box, "--class", "kow"), "'cow'"),
        (("photo.png", *box, "--dilate", -1), "--dilate"),
        (("photo.png", *box, "--num", 0), "--num"),
        (("photo.png", *box, "--out", "e.jpg"), ".png"),
        (("photo.png", *box, "--out", "photo.png/e.png"), "cannot write"),
        (("photo.png", *box, "--out", "photo.png"), "overwrite"),
        (("edit_1.png", *box), "overwrite"),
        (("photo.png", *box, "--model", "nowhere"), "nowhere"),
    ]:
        status, out, err = run("edit", *arguments)
        assert status == 2 and len(err) == 1, (arguments, out, err)
        assert part in err[0], (arguments, err)
    assert files(tmp_path) == before and (tmp_path / "photo.png").read_bytes() == whole
