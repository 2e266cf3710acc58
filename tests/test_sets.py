"""What is scored and against what: folders, shards, npz files of images and of statistics."""

import io
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import one_line
from pictures import encoded, make_folder, picture
from PIL import Image
from webdataset import TarWriter

from maskgit.common import UserError
from maskgit.engine.data import DataConfig, open_images
from maskgit.evaluation.npz import write_npz
from maskgit.evaluation.sets import PixelSet, StatisticsFile, open_set


def pixels_of(images, batch_size=4):
    return torch.cat(list(images.batches(batch_size)))


def noise(count, size=(12, 10), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


# Folders, shards and the bundled set


def test_class_folders(tmp_path):
    images = open_set(str(make_folder(tmp_path / "set", ["dog", "cat"], 5)))
    assert isinstance(images, PixelSet)
    assert (images.kind, images.name) == ("folder", str(tmp_path / "set"))
    assert (len(images), images.size, images.jpeg, images.resized) == (10, (20, 20), 0, 0)
    assert (images.classes, images.labels) == (["cat", "dog"], [0] * 5 + [1] * 5)
    batches = list(images.batches(4))
    assert [tuple(batch.shape) for batch in batches] == [(n, 3, 20, 20) for n in (4, 4, 2)]
    assert all(batch.dtype == torch.uint8 and batch.is_contiguous() for batch in batches)
    for i, pixels in enumerate(torch.cat(batches)):
        file = tmp_path / "set" / images.classes[images.labels[i]] / f"{i % 5:03}.png"
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
    assert torch.equal(pixels_of(images, 3), torch.cat(batches))


def test_a_flat_folder_has_no_classes(tmp_path):
    make_folder(tmp_path, ["flat"], 3)
    images = open_set(str(tmp_path / "flat"))
    assert (images.classes, images.labels) == ([], [None] * 3)


def test_shards_hold_what_the_folder_holds(tmp_path):
    folder = make_folder(tmp_path / "set", ["cat", "dog"], 3)
    files = sorted(folder.rglob("*.png"))
    for shard in range(2):
        with TarWriter(str(tmp_path / f"s-{shard}.tar")) as tar:
            for i, file in enumerate(files[3 * shard : 3 * shard + 3]):
                name = file.parent.name
                tar.write({"__key__": f"{i}", "png": file.read_bytes(), "cls": name.encode()})
    loose, shards = open_set(str(folder)), open_set(str(tmp_path / "s-{0..1}.tar"))
    assert (shards.kind, shards.labels, shards.classes) == ("shards", loose.labels, loose.classes)
    assert torch.equal(pixels_of(shards), pixels_of(loose))
    assert shards.hash == loose.hash  # of the content, wherever it lies


def test_bundled_sets():
    train, held = open_set("emoji"), open_set("emoji:heldout")
    assert (train.kind, train.size, train.jpeg, train.resized) == ("bundled", (64, 64), 0, 0)
    assert len(train) > len(held) > 0
    assert train.classes == held.classes
    assert train.hash != held.hash
    expected = open_images(DataConfig("emoji:heldout"))
    assert torch.equal(next(held.batches(3)), torch.stack([expected[i]["image"] for i in range(3)]))
    assert held.labels == expected.labels


def test_the_crops_are_those_of_training(tmp_path):
    for i, size in enumerate([(40, 30), (16, 16), (300, 200)]):
        picture(i, size).save(tmp_path / f"{i}.jpg")
    images = open_set(str(tmp_path), (16, 16))
    expected = open_images(DataConfig(str(tmp_path), [16, 16], heldout=0))
    assert torch.equal(pixels_of(images), torch.stack([expected[i]["image"] for i in range(3)]))
    assert (images.size, images.resized, images.jpeg) == ((16, 16), 2, 3)


def test_sizes_that_differ_are_named_and_size_mends_it(tmp_path):
    make_folder(tmp_path, ["a"], 2)
    picture(1, (24, 20)).save(tmp_path / "a" / "wide.png")
    with pytest.raises(UserError) as error:
        open_set(str(tmp_path))
    one_line(error, "a/000.png has 20x20", "a/wide.png has 24x20", "--size")
    assert open_set(str(tmp_path), (20, 20)).resized == 1


def test_images_on_their_side_count_as_they_are_shown(tmp_path):
    mark = Image.Exif()
    mark[0x0112] = 6
    for form in ("jpeg", "png", "webp"):
        picture(0, (20, 10)).save(tmp_path / f"turned.{form}", exif=mark)
    picture(0, (10, 20)).save(tmp_path / "upright.png")
    images = open_set(str(tmp_path))
    assert (images.size, images.resized) == ((20, 10), 0)
    assert pixels_of(images).shape == (4, 3, 20, 10)


def test_jpeg_files_are_known_by_their_content(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(0), "JPEG"))
    (tmp_path / "b.jpg").write_bytes(encoded(picture(1), "PNG"))
    (tmp_path / "c.JPG").write_bytes(encoded(picture(2), "JPEG"))
    assert open_set(str(tmp_path)).jpeg == 2


def test_the_hash_is_of_the_content_and_not_of_names(tmp_path):
    first = open_set(str(make_folder(tmp_path / "one", ["a"], 3))).hash
    assert open_set(str(make_folder(tmp_path / "other", ["b"], 3))).hash == first
    file = tmp_path / "one" / "a" / "001.png"
    file.write_bytes(encoded(picture(7)))
    assert open_set(str(tmp_path / "one")).hash != first


def test_a_broken_image_is_an_error_and_not_left_out(tmp_path):
    make_folder(tmp_path, ["a"], 3)
    whole = encoded(Image.fromarray(noise(1, (20, 20))[0]))
    broken = tmp_path / "a" / "broken.png"
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as error:
        pixels_of(open_set(str(tmp_path)))
    one_line(error, broken, "mend it")
    for content, reason in ((b"", "empty"), (b"text", "cannot identify"), (whole[:20], "")):
        broken.write_bytes(content)
        with pytest.raises(UserError) as error:
            open_set(str(tmp_path))
        one_line(error, broken, reason)


def test_warnings_are_as_before(tmp_path):
    images = open_set(str(make_folder(tmp_path / "set", ["a"], 9)))
    before = list(warnings.filters)
    pixels_of(images, 2)
    next(images.batches(2))
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("nowhere", "is not there"),
        ("nowhere.npz", "is not there"),
        ("nowhere-{0..1}.tar", "no shard"),
        ("empty", "empty"),
        ("notes.txt", "another kind"),
        ("notes.npz", "no complete .npz"),
    ],
)
def test_sources_that_are_none(source, part, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "notes.npz"):
        (tmp_path / name).write_text("words")
    with pytest.raises(UserError) as error:
        open_set(str(tmp_path / source))
    one_line(error, source.partition("-")[0], part)


# npz files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_reads_as_numpy_does(save, tmp_path):
    file = tmp_path / "set.npz"
    save(file, noise(11), np.arange(11) % 4)
    images = open_set(str(file))
    with np.load(file) as arrays:
        expected = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
    for size in (1, 4, 11, 64):
        assert torch.equal(pixels_of(images, size), expected)
    assert (images.kind, len(images), images.size) == ("npz", 11, (12, 10))
    assert (images.labels, images.classes) == ([i % 4 for i in range(11)], ["0", "1", "2", "3"])
    assert (images.jpeg, images.resized) == (0, 0)
    assert len(images.hash) == 64
    smaller = open_set(str(file), (5, 5))
    assert (smaller.resized, pixels_of(smaller).shape) == (11, (11, 3, 5, 5))
    np.savez(file, noise(11))
    assert (open_set(str(file)).labels, open_set(str(file)).classes) == ([None] * 11, [])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_never_in_memory_as_a_whole(save, tmp_path):
    save(tmp_path / "large.npz", np.tile(noise(64, (64, 64)), (4, 1, 1, 1)))  # 3.1 MB
    tracemalloc.start()
    try:
        count = sum(len(batch) for batch in open_set(str(tmp_path / "large.npz")).batches(8))
        assert count == 256
        assert tracemalloc.get_traced_memory()[1] < 1.5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"images": noise(2)}, "holds images"),
        ({"arr_0": noise(2) / 255}, "float64"),
        ({"arr_0": noise(2).transpose(0, 3, 1, 2)}, "(2, 3, 12, 10)"),
        ({"arr_0": np.asfortranarray(noise(2))}, "transposed"),
        ({"arr_0": noise(0)}, "no images"),
        ({"arr_0": np.array([{}])}, "object"),
        ({"arr_0": noise(2), "arr_1": np.arange(3)}, "arr_1 is int64 (3,)"),
        ({"arr_0": noise(2), "arr_1": np.array([0, -1])}, "arr_1"),
        ({"mu": np.zeros(3)}, "holds mu"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, "(3, 2)"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "int64"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "not finite"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "plain arrays"),
    ],
)
def test_npz_of_something_else(arrays, part, tmp_path):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError) as error:
        open_set(str(tmp_path / "set.npz"))
    one_line(error, tmp_path / "set.npz", part)


def test_damaged_npz(tmp_path):
    file = tmp_path / "set.npz"
    np.savez(file, noise(9))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        pixels_of(open_set(str(file)))
    one_line(error, file, "fetch or write it again")
    file.write_bytes(content[:-200])
    with pytest.raises(UserError, match=r"no complete \.npz"):
        open_set(str(file))


def statistics(kind=np.float32):
    features = np.random.default_rng(1).normal(size=(40, 6))
    return features.mean(0).astype(kind), np.cov(features, rowvar=False).astype(kind)


def test_statistics_alone(tmp_path):
    mu, sigma = statistics(np.float32)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    found = open_set(str(tmp_path / "stats.npz"))
    assert isinstance(found, StatisticsFile)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert np.array_equal(found.mean.numpy(), mu.astype(float))
    assert np.array_equal(found.covariance.numpy(), sigma.astype(float))
    assert found.images is None


def test_statistics_with_a_part_of_their_images(tmp_path):
    mu, sigma = statistics(np.float64)
    file = tmp_path / "VIRTUAL_imagenet8.npz"
    np.savez(file, arr_0=noise(7), mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    found = open_set(str(file))
    assert isinstance(found, StatisticsFile)
    assert np.array_equal(found.covariance.numpy(), sigma)
    assert torch.equal(pixels_of(found.images), torch.tensor(noise(7)).permute(0, 3, 1, 2))
    assert found.hash == found.images.hash


def test_write_npz_is_what_numpy_reads(tmp_path):
    images = torch.from_numpy(noise(10)).permute(0, 3, 1, 2)
    write_npz(tmp_path / "samples.npz", images.split(4), 10, (12, 10))
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]
        assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (10, 12, 10, 3))
        assert np.array_equal(arrays["arr_0"], noise(10))
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:  # as the ADM evaluator streams it
        assert np.lib.format.read_magic(io.BytesIO(archive.read("arr_0.npy"))) == (1, 0)
    assert torch.equal(pixels_of(open_set(str(tmp_path / "samples.npz"))), images)


def test_write_npz_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "samples.npz"
    file.write_bytes(b"before")
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)

    def stopped():
        yield images
        raise KeyboardInterrupt

    for batches, count, part in (
        ([images], 5, "4 images instead of 5"),
        ([images, images[..., :4]], 8, "(3, 8, 4)"),
        ([images.float()], 4, "float32"),
    ):
        with pytest.raises(UserError) as error:
            write_npz(file, batches, count, (8, 8))
        one_line(error, file, part)
    with pytest.raises(KeyboardInterrupt):
        write_npz(file, stopped(), 8, (8, 8))
    with pytest.raises(UserError, match="cannot write"):
        write_npz(tmp_path / "no" / "samples.npz", [images], 4, (8, 8))
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
