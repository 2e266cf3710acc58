"""Token caches: what is in them, that they can be gone on with, and that they are told apart."""

import json
import shutil

import pytest
import torch
from conftest import one_line
from pictures import config, make_folder
from tiny_tokenizer import save_tokenizer, shards

from maskgit.common import UserError
from maskgit.engine.data import open_images
from maskgit.engine.order import sample_seeds
from maskgit.engine.tokenize import make_tokens
from maskgit.engine.tokens import TokenSet, fixed_batches, open_tokens, token_batches
from maskgit.tokenized import token_stamp
from vqgan import VQGAN

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path):
    """Thirty pictures in two classes."""
    return make_folder(tmp_path / "photos", ["left", "right"], 15)


class Maker:
    """`Maker(...)(folder)` makes a cache of all `photos` in a folder, `opened` opens it too."""

    def __init__(self, photos, tokenizer, shard_images=8, crops=0, **data):
        self.images = open_images(config(photos, heldout=0, **data))
        self.vqgan = VQGAN.from_pretrained(tokenizer)
        how = dict(crops=crops, seed=5, shard_images=shard_images)
        self.stamp = token_stamp(str(tokenizer), self.vqgan, self.images, **how)

    def __call__(self, folder, **share):
        return make_tokens(folder, self.stamp, self.images, self.vqgan.encode, CPU, 3, **share)

    def opened(self, folder):
        assert self(folder)
        return open_tokens(folder)[1]


# What is in a cache.


@pytest.mark.parametrize(("codes", "kind"), [(16, "U16"), (65536, "U16"), (65537, "U32")])
def test_tokens_are_those_of_each_image_of_its_crops_and_of_their_mirror_images(
    codes, kind, photos, tmp_path
):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", codes)
    make = Maker(photos, tokenizer, crops=2, no_mirror=["right"])
    tokens = make.opened(tmp_path / "tokens")
    assert (len(tokens), tokens.variants) == (30, 6)
    assert f'"dtype":"{kind}"' in (tmp_path / "tokens/tokens-00000.safetensors").read_text("latin")
    cropped = open_images(config(photos, heldout=0, crop="random", mirror=False))
    largest = 0
    for i in (0, 7, 8, 20, 29):
        views = [make.images[i], *(cropped.get(i, k, seed=5) for k in range(2))]
        for k, view in enumerate(views):
            picture = view["image"][None].float() / 255
            mirrored = picture.flip(3) if i < 15 else picture
            for m, pixels in enumerate((picture, mirrored)):
                found = tokens.take([i], [2 * k + m])
                assert torch.equal(found["tokens"], make.vqgan.encode(pixels).flatten(1))
                assert found["index"].item() == i and found["label"].item() == i // 15
                largest = max(largest, found["tokens"].max().item())
        assert not torch.equal(views[0]["image"], views[1]["image"])
        assert not torch.equal(views[1]["image"], views[2]["image"])
    assert largest > codes // 2


def test_sets_that_are_not_mirrored_have_no_mirrored_variant(photos, tokenizer_folder, tmp_path):
    for crops in (0, 1):
        make = Maker(photos, tokenizer_folder, crops=crops, mirror=False)
        assert make.opened(tmp_path / str(crops)).variants == 1 + crops


def test_the_index_says_what_the_tokens_are_of(photos, tokenizer_folder, tmp_path):
    folder = tmp_path / "tokens"
    make = Maker(photos, tokenizer_folder)
    make.opened(folder)
    index = json.loads((folder / "index.json").read_text())
    assert index["stamp"]["grid"] == [4, 4] and index["stamp"]["classes"] == ["left", "right"]
    assert index["stamp"]["tokenizer_name"] == str(tokenizer_folder)
    assert index["stamp"]["data_path"] == str(photos) and index["broken"] == {}
    assert [shard["images"] for shard in index["shards"]] == [8, 8, 8, 6]
    assert [shard["file"] for shard in index["shards"]] == list(shards(folder))
    assert open_tokens(folder)[0] == make.stamp


def test_tokens_stay_in_their_files(photos, tokenizer_folder, tmp_path):
    tokens = Maker(photos, tokenizer_folder).opened(tmp_path / "tokens")
    with open("/proc/self/maps") as maps:
        mapped = maps.read()
    assert all(str(tmp_path / "tokens" / name) in mapped for name in shards(tmp_path / "tokens"))
    assert len(tokens) == 30


def test_unusable_images_are_left_out_and_named(photos, tokenizer_folder, tmp_path):
    broken = [photos / "left" / f"{i:03}.png" for i in (2, 8, 9, 10, 11)]
    for path in broken:
        path.write_bytes(b"no picture")
    folder = tmp_path / "tokens"
    make = Maker(photos, tokenizer_folder, shard_images=4, max_broken=0.2)  # all of a shard, too
    tokens = make.opened(folder)
    assert len(tokens) == 25 and make.images.broken.keys() == {str(path) for path in broken}
    index = json.loads((folder / "index.json").read_text())
    assert index["broken"].keys() == {str(path) for path in broken}
    assert [shard["images"] for shard in index["shards"]] == [3, 4, 0, 4, 4, 4, 4, 2]
    rows = [tokens.take([row], [0])["index"].item() for row in range(25)]
    assert rows == [i for i in range(30) if i not in (2, 8, 9, 10, 11)]
    again = Maker(photos, tokenizer_folder, shard_images=4, max_broken=0.2)
    assert again(folder) and again.images.broken.keys() == index["broken"].keys()
    with pytest.raises(UserError) as error:
        Maker(photos, tokenizer_folder, shard_images=4)(tmp_path / "others")
    one_line(error, "max_broken=0.01", broken[0])
    assert not (tmp_path / "others" / "index.json").exists()


# Going on, and sharing the work.


def test_what_is_there_is_kept_and_what_is_damaged_is_made_anew(
    photos, tokenizer_folder, tmp_path, caplog
):
    folder, make = tmp_path / "tokens", Maker(photos, tokenizer_folder, crops=1)
    make(folder)
    whole, index = shards(folder), (folder / "index.json").read_bytes()
    names = list(whole)
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(whole[names[1]][:-5])
    content = bytearray(whole[names[2]])
    content[-3] ^= 1
    (folder / names[2]).write_bytes(content)
    (folder / f".{names[0]}.77").write_bytes(b"half")
    (folder / ".index.json.77").write_bytes(b"half")
    (folder / "index.json").unlink()
    untouched = (folder / names[3]).stat().st_mtime_ns
    assert make(folder)
    assert shards(folder) == whole and (folder / "index.json").read_bytes() == index
    assert (folder / names[3]).stat().st_mtime_ns == untouched
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", *names]
    for what in (f".{names[0]}.77", ".index.json.77", f"{names[1]} is damaged"):
        assert what in caplog.text
    assert f"{names[3]} is damaged" not in caplog.text


@pytest.mark.parametrize("turns", [(0, 1, 2), (2, 1, 0), (1, 1, 0, 2)])
def test_processes_share_the_shards_and_the_last_one_writes_the_index(
    turns, photos, tokenizer_folder, tmp_path
):
    make = Maker(photos, tokenizer_folder)
    make(tmp_path / "one")
    folder = tmp_path / "three"
    left = {0, 1, 2}
    for process in turns:
        left.discard(process)
        assert make(folder, process=process, processes=3) == (not left)
        assert (folder / "index.json").exists() == (not left)
    assert shards(folder) == shards(tmp_path / "one")
    assert (folder / "index.json").read_bytes() == (tmp_path / "one/index.json").read_bytes()


@pytest.mark.parametrize("flip", [-3, 30, 400])
def test_a_damaged_shard_is_named(flip, photos, tokenizer_folder, tmp_path):
    make, folder = Maker(photos, tokenizer_folder), tmp_path / "tokens"
    make(folder)
    path = folder / "tokens-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[flip] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_tokens(folder)
    one_line(error, path, "SHA-256")
    path.unlink()
    with pytest.raises(UserError) as error:
        open_tokens(folder)
    one_line(error, path, "missing")
    assert len(make.opened(folder)) == 30


@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_of_another_stamp_is_refused_naming_both(
    complete, photos, tokenizer_folder, tmp_path
):
    folder, make = tmp_path / "tokens", Maker(photos, tokenizer_folder)
    make(folder)
    if not complete:
        (folder / "index.json").unlink()
        (folder / "tokens-00000.safetensors").unlink()
    before = shards(folder)
    other = save_tokenizer(tmp_path / "other", seed=1)
    more = make_folder(tmp_path / "more", ["left", "right"], 20)
    for others, names in (
        (Maker(photos, other), (tokenizer_folder, other)),
        (Maker(more, tokenizer_folder), (photos, more)),
        (Maker(photos, tokenizer_folder, crops=1), ("crops: 0, now 1",)),
        (Maker(photos, tokenizer_folder, mirror=False), ("mirror: True, now False",)),
    ):
        with pytest.raises(UserError) as error:
            others(folder)
        one_line(error, folder, make.stamp.tokenizer[:12], *names)
    assert shards(folder) == before
    shutil.copytree(tokenizer_folder, tmp_path / "same")  # weights count, not where they are
    assert Maker(photos, tmp_path / "same")(folder)


# Batches.


def token_set():
    """Ten images in two shards, three variants each: token 100 i + v everywhere."""
    grid = 100 * torch.arange(10)[:, None, None] + torch.arange(3)[:, None].expand(10, 3, 4)
    grid = grid.to(torch.uint16)
    return TokenSet([grid[:4], grid[4:]], torch.arange(10) % 2, torch.arange(10))


def test_batches_resume_at_any_step_and_pass_over_every_image_and_variant():
    stream = token_batches(token_set(), 5, seed=3)
    whole = [next(stream) for _ in range(60)]
    for start in (1, 4):
        resumed = next(token_batches(token_set(), 5, seed=3, start_step=start))
        assert all(torch.equal(resumed[k], whole[start][k]) for k in resumed)
    for epoch in range(3):
        seen = torch.cat([b["index"] for b in whole[2 * epoch : 2 * epoch + 2]])
        assert sorted(seen.tolist()) == list(range(10))
    variants = torch.cat([b["tokens"][:, 0] - 100 * b["index"] for b in whole])
    assert variants.bincount().min() > 70 and len(variants.bincount()) == 3  # of 300 in all
    for step, batch in enumerate(whole):
        assert batch["tokens"].dtype == torch.int64 and batch["tokens"].shape == (5, 4)
        assert torch.equal(batch["seed"], sample_seeds(3, range(5 * step, 5 * step + 5)))
        assert torch.equal(batch["label"], batch["index"] % 2)


def test_processes_share_each_step_in_order():
    images = token_set()
    one = token_batches(images, 6, seed=3, start_step=2)
    three = [token_batches(images, 6, seed=3, start_step=2, rank=r, world_size=3) for r in range(3)]
    for _ in range(4):
        whole, parts = next(one), [next(part) for part in three]
        for key, value in whole.items():
            assert torch.equal(value, torch.cat([part[key] for part in parts]))
    with pytest.raises(UserError, match=r"train.batch_size=6 .* 4 processes"):
        next(token_batches(images, 6, world_size=4))


def test_fixed_batches_are_spread_over_the_set_and_as_they_are():
    fixed = list(fixed_batches(token_set(), 3, most=5))
    assert torch.cat([b["index"] for b in fixed]).tolist() == [0, 2, 4, 6, 8]
    assert torch.cat([b["tokens"][:, 0] for b in fixed]).tolist() == [0, 200, 400, 600, 800]
