"""Data sets: every kind of file, splits, order, resume, variation, and files that are broken."""

import io
import itertools
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from maskgit.common import UserError
from maskgit.engine.data import DataConfig, batches, in_order, open_images
from maskgit.engine.images import BadImage, decode, fit
from maskgit.engine.order import Order

SIZE = (16, 16)
KEYS = ("image", "label", "index")


def picture(number, size=(20, 20)):
    """A picture that differs with its number and is not its own mirror image."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = (number * 37 % 256, number * 91 % 256, 200)
    pixels[: size[1] // 2, -1] = 255
    return Image.fromarray(pixels)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def make_folder(root, classes, each):
    for group in classes:
        (root / group).mkdir(parents=True)
        for i in range(each):
            picture(i + 100 * len(group)).save(root / group / f"{i:03}.png")
    return root


def config(path, **options):
    return DataConfig(path=str(path), size=list(SIZE), **options)


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in KEYS)


# One image of any kind


def test_all_kinds_of_files_give_the_same_colours():
    red = Image.new("RGB", (32, 24), (200, 40, 40))
    half = Image.new("RGBA", (32, 24), (200, 40, 40, 255))
    half.paste((0, 0, 0, 0), (16, 0, 32, 24))  # transparent black: shows white
    files = {
        "png": encoded(red),
        "jpeg": encoded(red, "JPEG", quality=95),
        "webp": encoded(red, "WEBP", lossless=True),
        "bmp": encoded(red, "BMP"),
        "palette": encoded(red.convert("P", palette=Image.Palette.ADAPTIVE)),
        "cmyk": encoded(red.convert("CMYK"), "JPEG", quality=95),
        "rgba": encoded(half),
        "transparent palette": encoded(half.quantize(4)),
        "gif": encoded(red, "GIF"),
    }
    for kind, content in files.items():
        pixels = decode(content, SIZE, 10**6)
        assert (pixels.shape, pixels.dtype) == ((24, 32, 3), np.uint8), kind
        assert np.abs(pixels[12, 8].astype(int) - (200, 40, 40)).max() <= 4, kind
        if kind in ("rgba", "transparent palette"):
            assert (pixels[12, 24] == 255).all(), kind


def test_grey_and_deep_images_keep_their_brightness():
    ramp = np.linspace(0, 65535, 32 * 24).reshape(24, 32)
    expected = np.rint(ramp / 257)[..., None]
    deep = Image.fromarray(ramp.astype(np.uint16))
    floats = Image.fromarray((ramp / 65535).astype(np.float32))
    for content in (encoded(deep), encoded(deep, "TIFF"), encoded(floats, "TIFF")):
        assert np.abs(decode(content, SIZE, 10**6) - expected).max() <= 1
    grey = Image.fromarray(expected[..., 0].astype(np.uint8))
    alpha = grey.convert("LA")
    alpha.putalpha(0)
    assert (decode(encoded(grey), SIZE, 10**6) == expected).all()
    assert (decode(encoded(alpha), SIZE, 10**6) == 255).all()
    assert set(np.unique(decode(encoded(grey.convert("1")), SIZE, 10**6))) == {0, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(orientation):
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste("red", (0, 0, 10, 10))  # at the top left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(stored, exif=exif), SIZE, 10**6)
    assert (pixels == np.asarray(upright)).all()


def test_unusable_bytes_say_why():
    good = encoded(picture(1, (200, 200)), "JPEG")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    png = encoded(Image.fromarray(noise))
    for content, reason in (
        (b"", "empty"),
        (b"no image at all", "cannot identify"),
        (good[: len(good) // 2], "truncated"),
        (png[: len(png) // 2], "truncated"),
        (png[:2000] + b"\0" * 100 + png[2100:], "."),
        (encoded(Image.new("1", (5000, 5000))), "oversized: 5000x5000"),
        (encoded(Image.new("1", (10000, 10000))), "oversized: 10000x10000"),
    ):
        with pytest.raises(BadImage, match=reason) as error:
            decode(content, SIZE, 10**6)
        assert str(error.value)
        assert "\n" not in str(error.value)


def test_a_large_jpeg_is_decoded_small_but_looks_the_same():
    ramp = np.tile(np.linspace(0, 255, 1600).astype(np.uint8), (1200, 1))
    content = encoded(Image.fromarray(ramp).convert("RGB"), "JPEG", quality=95)
    pixels = decode(content, SIZE, 10**7)
    assert 32 <= pixels.shape[0] < 400
    exact = fit(np.asarray(Image.open(io.BytesIO(content))), SIZE)
    assert np.abs(fit(pixels, SIZE).astype(int) - exact).max() <= 3


def test_fit_crops_the_middle_and_scales_once():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert (fit(wide, (10, 10)) >= 230).all()
    assert (fit(wide, (10, 10))[:, 1:-1] == 255).all()
    assert fit(wide, (10, 30)).shape == (10, 30, 3)
    assert fit(wide, (40, 20)).shape == (40, 20, 3)
    assert fit(wide, (20, 60)) is wide
    assert fit(np.zeros((1, 500, 3), np.uint8), (16, 16)).shape == (16, 16, 3)


def test_a_random_crop_stays_inside_and_varies():
    y, x = np.mgrid[:100, :100].astype(np.uint8)
    pixels = np.stack([y, x, x], 2)
    random = np.random.default_rng(0)
    crops = [fit(pixels, (50, 50), random).astype(int) for _ in range(50)]
    heights = [crop[-1, 0, 0] - crop[0, 0, 0] for crop in crops]
    assert 76 <= min(heights) < 84
    assert 92 < max(heights) <= 99
    assert len({crop.tobytes() for crop in crops}) == 50


# Sets


def test_class_folders(tmp_path):
    folder = make_folder(tmp_path / "set", ["dog", "cat", "a bird"], 12)
    (folder / "cat" / "deeper").mkdir()
    picture(7).save(folder / "cat" / "deeper" / "x.webp")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "y.png").write_bytes(b"hidden")
    (folder / "cat" / "000.txt").write_text("a caption of 000.png")
    (folder / "loop").symlink_to(folder)
    train, held = (open_images(config(folder), split) for split in ("train", "heldout"))
    assert train.classes == held.classes == ["a bird", "cat", "dog"]
    assert len(train) + len(held) == 37
    assert len(held) >= 1
    names = [item.name for item in (*train.items, *held.items)]
    assert len(set(names)) == 37
    assert "cat/deeper/x.webp" in names
    for images in (train, held):
        for i, item in enumerate(images.items):
            sample = images[i]
            assert images.classes[sample["label"]] == item.name.split("/")[0]
            assert (sample["image"].shape, sample["image"].dtype) == ((3, *SIZE), torch.uint8)
        assert images.labels == [images[i]["label"] for i in range(len(images))]


def test_a_flat_folder_has_no_classes(tmp_path):
    make_folder(tmp_path, ["flat"], 5)
    images = open_images(config(tmp_path / "flat", heldout=0))
    assert (images.classes, images.labels) == ([], [-1] * 5)
    assert next(batches(images, 4))["label"].tolist() == [-1] * 4


def test_the_split_of_a_file_does_not_depend_on_the_others(tmp_path):
    make_folder(tmp_path, ["a", "b"], 40)
    held = {item.name for item in open_images(config(tmp_path), "heldout").items}
    half = {item.name for item in open_images(config(tmp_path, heldout=0.5), "heldout").items}
    assert 1 <= len(held) <= 20 < len(half) < 60
    assert held < half
    for name in sorted(half - held)[:5]:
        (tmp_path / name).unlink()
    assert held == {item.name for item in open_images(config(tmp_path), "heldout").items}
    assert len(open_images(config(tmp_path, heldout=0))) == 75
    with pytest.raises(UserError, match="no held-out images"):
        open_images(config(tmp_path, heldout=0), "heldout")


def test_the_fingerprint_changes_with_the_files(tmp_path):
    make_folder(tmp_path, ["a", "b"], 5)
    before = open_images(config(tmp_path, heldout=0)).fingerprint
    assert before == open_images(config(tmp_path, heldout=0, crop="random")).fingerprint
    (tmp_path / "a" / "000.png").write_bytes(encoded(picture(3, (90, 90))))
    after = open_images(config(tmp_path, heldout=0)).fingerprint
    (tmp_path / "a").rename(tmp_path / "c")
    assert len({before, after, open_images(config(tmp_path, heldout=0)).fingerprint}) == 3


def write_shards(folder, make_sample, shards=2, each=6):
    for shard, i in itertools.product(range(shards), range(each)):
        number = shard * each + i
        if i == 0:
            tar = TarWriter(str(folder / f"set-{shard:03}.tar"), encoder=False)
        tar.write({"__key__": f"dir.1/{number:04}", **make_sample(number)})
        if i == each - 1:
            tar.close()
    return f"{folder}/set-{{000..{shards - 1:03}}}.tar"


def test_shards(tmp_path):
    def sample(number):
        label = json.dumps({"class": ["dog", "cat"][number % 2], "label": 7}).encode()
        return {"png": encoded(picture(number)), "json": label, "mask.txt": b"x"}

    images = open_images(config(write_shards(tmp_path, sample), heldout=0))
    assert images.classes == ["cat", "dog"]
    assert images.labels == [1, 0] * 6
    assert images.items[7].name == "set-001.tar/dir.1/0007"
    expected = fit(np.asarray(picture(7)), SIZE)
    assert (images[7]["image"].permute(1, 2, 0).numpy() == expected).all()
    train = open_images(config(f"{tmp_path}/set-{{000..001}}.tar", heldout=0.3))
    held = open_images(config(f"{tmp_path}/set-{{000..001}}.tar", heldout=0.3), "heldout")
    assert {*train.items, *held.items} == set(images.items)
    assert len(train) + len(held) == 12


@pytest.mark.parametrize(
    ("extra", "classes", "labels"),
    [
        (lambda n: {"cls": str(n % 3).encode()}, ["0", "1", "2"], [0, 1, 2, 0]),
        (lambda n: {"cls": [b"b\n", b"a\n"][n % 2]}, ["a", "b"], [1, 0, 1, 0]),
        (lambda n: {"json": json.dumps({"label": 2 * n}).encode()}, list("0123456"), [0, 2, 4, 6]),
        (lambda n: {"json": b'{"caption": "x"}'}, [], [-1] * 4),
        (lambda n: {}, [], [-1] * 4),
    ],
)
def test_labels_of_shards(tmp_path, extra, classes, labels):
    path = write_shards(
        tmp_path, lambda n: {"jpg": encoded(picture(n), "JPEG"), **extra(n)}, shards=1, each=4
    )
    images = open_images(config(path, heldout=0))
    assert (images.classes, images.labels) == (classes, labels)


def test_bad_shards_are_told_in_one_line(tmp_path):
    png = encoded(picture(1))
    whole = write_shards(tmp_path, lambda n: {"png": png}, shards=1)
    content = (tmp_path / "set-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:1000])
    (tmp_path / "junk.tar").write_bytes(b"junk" * 500)
    (tmp_path / "set.tar.gz").write_bytes(content)
    for make in (
        lambda n: {"png": png, **({"cls": b"1"} if n else {})},
        lambda n: {"png": png, "cls": b"1" if n else b"cat"},
        lambda n: {"png": png, "cls": b"-1" if n else b"1"},
        lambda n: {"png": png, "json": b"{"},
        lambda n: {"txt": b"no image"},
    ):
        folder = tmp_path / f"bad{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        with pytest.raises(UserError) as error:
            open_images(config(write_shards(folder, make, shards=1, each=2)))
        assert str(folder) in str(error.value)
    for path, words in (
        (tmp_path / "cut.tar", "complete"),
        (tmp_path / "junk.tar", "complete"),
        (tmp_path / "set.tar.gz", "uncompressed"),
        (tmp_path / "set-{000..001}.tar", "no shard"),
        (tmp_path / "set-{000.tar", "set-{000.tar"),
        ("http://somewhere/x.tar", "no shard"),
    ):
        with pytest.raises(UserError, match=words) as error:
            open_images(config(path))
        assert "\n" not in str(error.value)
    assert len(open_images(config(whole, heldout=0))) == 6


def test_the_bundled_set():
    train, tones = (open_images(DataConfig(path=path)) for path in ("emoji", "emoji:tones"))
    held = open_images(DataConfig(), "heldout")
    assert (len(train), len(tones), len(held)) == (1681, 1681 + 1635, 189)
    assert train.classes == tones.classes == held.classes
    assert train.classes[0] == "face-smiling"
    assert tones.items[: len(train)] == train.items
    direct = open_images(DataConfig(path="emoji:heldout"))
    assert (
        direct.items == held.items == open_images(DataConfig(path="emoji:tones"), "heldout").items
    )
    assert direct.fingerprint != train.fingerprint
    first = train[0]
    assert first["image"].shape == (3, 64, 64)
    assert train.classes[first["label"]] == "face-smiling"
    assert (first["image"][:, 0, 0] == 255).all()
    assert not any(held.may_mirror(i) for i in range(len(held)))
    assert not any(direct.may_mirror(i) for i in range(len(direct)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "emojis"}, "no data at emojis.*emoji:heldout"),
        ({"path": "emoji:tone"}, "no data at"),
        ({"crop": "centre"}, "did you mean 'center'"),
        ({"size": [64]}, "height and width"),
        ({"size": [64, 0]}, "height and width"),
        ({"heldout": 1.0}, "data.heldout"),
        ({"max_broken": 2.0}, "data.max_broken"),
    ],
)
def test_wrong_settings_are_told_in_one_line(options, words):
    with pytest.raises(UserError, match=words):
        open_images(DataConfig(**options))


def test_folders_without_use_are_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="empty"):
        open_images(config(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="empty"):
        open_images(config(tmp_path))
    picture(1).save(tmp_path / "a" / "1.png")
    picture(1).save(tmp_path / "loose.png")
    with pytest.raises(UserError, match="loose files"):
        open_images(config(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        open_images(config(tmp_path / "loose.png"))
    with pytest.raises(UserError, match="unknown split"):
        open_images(config(tmp_path / "a"), "test")


# Variation


def test_mirroring_depends_on_seed_index_and_draw_only(tmp_path):
    folder = make_folder(tmp_path, ["arrow", "cat"], 4)
    images = open_images(config(folder, heldout=0, no_mirror=["arrow"]))
    assert [images.may_mirror(i) for i in range(8)] == [False] * 4 + [True] * 4
    for index in range(8):
        plain = images[index]["image"]
        drawn = [images.get(index, draw, seed=3)["image"] for draw in range(40)]
        mirrored = [torch.equal(image, plain.flip(2)) for image in drawn]
        assert all(m or torch.equal(i, plain) for m, i in zip(mirrored, drawn, strict=True))
        assert 8 < sum(mirrored) < 32 if index >= 4 else not any(mirrored)
    again = open_images(config(folder, heldout=0, no_mirror=["arrow"]))
    assert torch.equal(again.get(5, 9, seed=3)["image"], images.get(5, 9, seed=3)["image"])
    other = [
        torch.equal(images.get(5, d, 3)["image"], images.get(5, d, 4)["image"]) for d in range(20)
    ]
    assert not all(other)
    plain = open_images(config(folder, heldout=0, mirror=False))
    assert torch.equal(plain.get(5, 9, seed=3)["image"], plain[5]["image"])


def test_random_crops_are_a_function_of_the_draw(tmp_path):
    folder = make_folder(tmp_path, ["a", "b"], 5)
    images = open_images(config(folder, crop="random", mirror=False, heldout=0.2))
    views = [images.get(0, draw)["image"] for draw in range(10)]
    assert len({view.numpy().tobytes() for view in views}) > 5
    assert torch.equal(views[4], images.get(0, 4)["image"])
    assert torch.equal(images[0]["image"], images.get(0)["image"])
    held = open_images(config(folder, crop="random", heldout=0.2), "heldout")
    assert torch.equal(held.get(0, 3)["image"], held[0]["image"])


def test_rectangles_and_classes_that_do_not_exist(tmp_path, caplog):
    folder = make_folder(tmp_path, ["arrow", "cat"], 3)
    images = open_images(DataConfig(path=str(folder), size=[8, 24], heldout=0))
    assert images[0]["image"].shape == (3, 8, 24)
    open_images(config(folder, no_mirror=["arow", "cat"]))
    assert "no class arow" in caplog.text


# Order


def test_an_epoch_has_every_image_once():
    order = Order([0] * 10, seed=1)
    epochs = [[order(draw) for draw in range(10 * e, 10 * e + 10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Order([0] * 10, seed=1)(draw) for draw in (25, 3)] == [epochs[2][5], epochs[0][3]]
    assert [Order([0] * 10, seed=2)(draw) for draw in range(10)] != epochs[0]


def test_a_balanced_order_has_each_class_equally_often():
    labels = [0] * 2 + [3] * 50 + [4] * 8
    order = Order(labels, seed=0, balanced=True)
    drawn = [order(draw) for draw in range(3 * 100)]
    for start in range(0, 300, 3):
        assert sorted(labels[i] for i in drawn[start : start + 3]) == [0, 3, 4]
    large = [i for i in drawn if labels[i] == 3]
    assert sorted(large[:50]) == sorted(large[50:]) == list(range(2, 52))
    assert large[:50] != large[50:]
    assert Order(labels, 0, balanced=True)(123) == drawn[123]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("set"), ["arrow", "cat", "dog"], 7)
    return open_images(config(folder, crop="random", heldout=0))


def take(iterator, number):
    return list(itertools.islice(iterator, number))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_at_any_step_with_any_workers(images, balanced, workers):
    state = torch.random.get_rng_state()
    whole = take(batches(images, 5, seed=7, balanced=balanced), 9)
    rest = batches(images, 5, seed=7, start_step=4, balanced=balanced, workers=workers)
    assert all(same(a, b) for a, b in zip(whole[4:], take(rest, 5), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert whole[0]["image"].shape == (5, 3, *SIZE)
    assert (whole[0]["label"].dtype, whole[0]["index"].dtype) == (torch.int64, torch.int64)
    assert whole[0]["label"].tolist() == [images.labels[i] for i in whole[0]["index"]]
    other = take(batches(images, 5, seed=8, balanced=balanced), 9)
    assert not all(same(a, b) for a, b in zip(whole, other, strict=True))


def test_processes_share_the_batches_of_one(images):
    whole = take(batches(images, 6, seed=1), 4)
    parts = [take(batches(images, 3, seed=1, rank=rank, world_size=2), 4) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        joined = {key: torch.cat([part[step][key] for part in parts]) for key in KEYS}
        assert same(batch, joined)


def test_in_order_gives_each_image_once_as_it_is(images):
    seen = take(in_order(images, 6), 10)
    assert [len(batch["index"]) for batch in seen] == [6, 6, 6, 3]
    assert torch.cat([batch["index"] for batch in seen]).tolist() == list(range(21))
    assert torch.equal(seen[1]["image"][2], images[8]["image"])


# Broken files


def spoil(folder, names):
    """Break files, each in another way."""
    ways = itertools.cycle(
        [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"text", bytes.swapcase]
    )
    for name, way in zip(names, ways, strict=False):
        (folder / name).write_bytes(way((folder / name).read_bytes()))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_skipped_counted_once_and_reported(tmp_path, caplog, workers):
    folder = make_folder(tmp_path, ["a", "b"], 20)
    clean = open_images(config(folder, heldout=0, mirror=False))
    bad = ["a/003.png", "a/004.png", "b/019.png"]
    spoil(folder, bad)
    (folder / "b" / "notes.txt").write_text("no image")
    (folder / "a" / "gone.png").symlink_to("nowhere")
    bad += ["b/notes.txt", "a/gone.png"]
    images = open_images(config(folder, heldout=0, mirror=False, max_broken=0.2))
    with caplog.at_level(logging.WARNING):
        seen = take(batches(images, 7, workers=workers), 18)  # three times through the set
    assert set(images.broken) == {str(folder / name) for name in bad}
    assert all(caplog.text.count(f"skipped {folder / name}:") == 1 for name in bad)
    indices = torch.cat([batch["index"] for batch in seen]).tolist()
    assert {images.items[i].name for i in indices} == {
        item.name for item in clean.items if item.name not in bad
    }
    for batch in seen:
        assert batch["label"].tolist() == [images.labels[i] for i in batch["index"]]
        assert len(batch["index"]) == 7
    plain = take(in_order(images, 8, workers=workers), 10)
    assert torch.cat([batch["index"] for batch in plain]).tolist() == sorted(set(indices))


def test_the_next_good_file_takes_the_place_of_a_broken_one(tmp_path):
    folder = make_folder(tmp_path, ["a", "b"], 10)
    spoil(folder, ["a/009.png", "b/000.png", "b/009.png"])
    images = open_images(config(folder, heldout=0, max_broken=0.5))
    assert [images[i]["index"] for i in (8, 9, 10, 11, 19)] == [8, 11, 11, 11, 0]
    assert images[9]["label"] == 1
    assert list(images[9]["broken"]) == [str(folder / "a/009.png"), str(folder / "b/000.png")]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_files_stop_the_run_with_the_list(tmp_path, workers):
    folder = make_folder(tmp_path, ["a", "b"], 50)
    spoil(folder, ["a/010.png", "b/020.png"])
    images = open_images(config(folder, heldout=0.1))
    with pytest.raises(UserError, match="2 of 100 files") as error:
        take(batches(images, 10, workers=workers), 30)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder / "a/010.png") in message
    assert str(folder / "b/020.png") in message
    allowed = open_images(config(folder, heldout=0.1, max_broken=0.02))
    take(batches(allowed, 10), 30)
    assert len(allowed.broken) == 2


def test_a_set_of_broken_files_only(tmp_path):
    folder = make_folder(tmp_path, ["a"], 4)
    spoil(folder, [f"a/{i:03}.png" for i in range(4)])
    for share, workers in ((0.01, 0), (0.01, 1), (1.0, 0)):
        images = open_images(config(folder, heldout=0, max_broken=share))
        with pytest.raises(UserError, match="can"):
            next(batches(images, 2, workers=workers))
    with pytest.raises(UserError, match="no usable image"):
        open_images(config(folder, heldout=0, max_broken=1.0)).get(0)


def test_oversized_images_are_left_out_by_their_header(tmp_path):
    make_folder(tmp_path, ["a"], 9)
    Image.new("1", (3000, 3000)).save(tmp_path / "a" / "large.png")
    (tmp_path / "a" / "raw.png").write_bytes(b"\0" * 10**6)
    images = open_images(config(tmp_path, heldout=0, max_broken=0.5, max_pixels=100_000))
    take(in_order(images, 4), 9)
    assert sorted(images.broken.values()) == [
        "oversized: 1000000 bytes",
        "oversized: 3000x3000 pixels",
    ]


def test_broken_samples_of_shards_are_reported_by_shard_and_key(tmp_path):
    def sample(number):
        return {} if number == 3 else {"png": b"junk" if number == 8 else encoded(picture(number))}

    path = write_shards(tmp_path, lambda n: {"cls": b"1", **sample(n)})
    images = open_images(config(path, heldout=0, max_broken=0.5))
    take(in_order(images, 4), 9)
    assert images.broken == {
        f"{tmp_path}/set-000.tar/dir.1/0003": "empty file",
        f"{tmp_path}/set-001.tar/dir.1/0008": "cannot identify image file",
    }
