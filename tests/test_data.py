"""Data sets: variation, order, resume, and files that are broken."""

import itertools
import logging

import pytest
import torch
from pictures import SIZE, config, make_folder
from PIL import Image
from webdataset import TarWriter

from maskgit.common import UserError
from maskgit.engine.data import DataConfig, batches, in_order, open_images
from maskgit.engine.order import Order, sample_seeds

KEYS = ("image", "label", "index", "seed")


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in KEYS)


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


@pytest.fixture(scope="module", params=["folder", "shards"])
def sixteen(request, tmp_path_factory):
    """Sixteen images of two classes, as a folder or as two shards."""
    folder = make_folder(tmp_path_factory.mktemp("sixteen"), ["cat", "dog"], 8)
    path = folder
    if request.param == "shards":
        path = f"{folder}/set-{{000..001}}.tar"
        for number, group in enumerate(["cat", "dog"]):
            with TarWriter(f"{folder}/set-{number:03}.tar", encoder=False) as tar:
                for file in sorted((folder / group).iterdir()):
                    key = f"{group}/{file.stem}"
                    tar.write({"__key__": key, "png": file.read_bytes(), "cls": group.encode()})
    return open_images(config(path, crop="random", heldout=0))


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (4, 2)])
def test_processes_share_the_samples_of_one_without_loss_or_repeat(sixteen, processes, workers):
    whole = take(batches(sixteen, 8, seed=1), 6)  # three times through the set
    parts = [
        take(batches(sixteen, 8, seed=1, workers=workers, rank=r, world_size=processes), 6)
        for r in range(processes)
    ]
    for step, batch in enumerate(whole):
        joined = {key: torch.cat([part[step][key] for part in parts]) for key in KEYS}
        assert same(batch, joined)
        assert batch["seed"].tolist() == sample_seeds(1, range(8 * step, 8 * step + 8)).tolist()
    for epoch in range(3):
        seen = [part[2 * epoch + i]["index"] for part in parts for i in (0, 1)]
        assert sorted(torch.cat(seen).tolist()) == list(range(16))


@pytest.mark.parametrize("changed", [(2, 2), (4, 0)])
def test_a_changed_number_of_processes_and_workers_goes_on_with_the_next_sample(sixteen, changed):
    """In the middle of the second epoch."""
    processes, workers = changed
    whole = take(batches(sixteen, 4, seed=2, workers=1), 9)
    rest = [
        take(batches(sixteen, 4, seed=2, start_step=6, workers=workers, rank=r, world_size=n), 3)
        for n in [processes]
        for r in range(n)
    ]
    for step in range(3):
        joined = {key: torch.cat([part[step][key] for part in rest]) for key in KEYS}
        assert same(whole[6 + step], joined)


def test_a_batch_that_cannot_be_shared_evenly_is_refused(images):
    with pytest.raises(UserError, match=r"train.batch_size=6 cannot.* 4 processes") as error:
        batches(images, 6, rank=0, world_size=4)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"train.batch_size=0 "):
        batches(images, 0)


def test_in_order_gives_each_image_once_as_it_is(images):
    seen = take(in_order(images, 6), 10)
    assert all("seed" not in batch for batch in seen)
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
