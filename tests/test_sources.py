"""Where images come from: folders, shards and the bundled set; splits and labels."""

import itertools
import json

import numpy as np
import pytest
import torch
from pictures import SIZE, config, encoded, make_folder, picture
from webdataset import TarWriter

from maskgit.common import UserError
from maskgit.engine.data import DataConfig, batches, in_order, open_images
from maskgit.engine.images import fit


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


def test_broken_samples_of_shards_are_reported_by_shard_and_key(tmp_path):
    def sample(number):
        return {} if number == 3 else {"png": b"junk" if number == 8 else encoded(picture(number))}

    path = write_shards(tmp_path, lambda n: {"cls": b"1", **sample(n)})
    images = open_images(config(path, heldout=0, max_broken=0.5))
    list(in_order(images, 4))
    assert images.broken == {
        f"{tmp_path}/set-000.tar/dir.1/0003": "empty file",
        f"{tmp_path}/set-001.tar/dir.1/0008": "cannot identify image file",
    }


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


def test_what_lies_beside_class_folders_is_reported(tmp_path, caplog):
    make_folder(tmp_path, ["a", "b"], 2)
    (tmp_path / "README.md").write_text("about")
    images = open_images(config(tmp_path, heldout=0))
    assert (images.classes, len(images), images.files) == (["a", "b"], 4, 4)
    assert "README.md" in caplog.text


def test_folders_without_use_are_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="empty"):
        open_images(config(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="empty"):
        open_images(config(tmp_path))
    picture(1).save(tmp_path / "a" / "1.png")
    picture(1).save(tmp_path / "loose.png")
    with pytest.raises(UserError, match="loose images"):
        open_images(config(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        open_images(config(tmp_path / "loose.png"))
    with pytest.raises(UserError, match="unknown split"):
        open_images(config(tmp_path / "a"), "test")
