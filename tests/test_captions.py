"""Captions: where they stand, how they find their image, and what is refused."""

import json
import tarfile

import pytest
import torch
from conftest import one_line, pictures

from clip.tokenizer import Tokenizer
from maskgit.common import UserError
from maskgit.engine.captions import captions_of, read_captions
from maskgit.engine.data import DataConfig, batches, in_order, open_images
from maskgit.engine.pairs import Pairs
from maskgit.engine.sources import list_folder, list_shards


@pytest.fixture
def folder(tmp_path):
    """Three drawings in a flat folder, called a, b and c."""
    for name, (_, content) in zip("abc", pictures(3), strict=True):
        (tmp_path / f"{name}.png").write_bytes(content)
    return tmp_path


def items(folder):
    return list_folder(folder).items


def test_the_bundled_drawings_have_names_and_keywords():
    images = open_images(DataConfig("emoji"), "train")
    captions = captions_of(images.items)
    assert len(captions) == len(images) == 1681
    joker = captions[[item.name for item in images.items].index("emoji-train.tar/1f0cf")]
    assert joker == ["joker", "joker, card, game, wildcard", "card", "game", "wildcard"]
    assert all(len(set(own)) == len(own) for own in captions)


def test_captions_lie_beside_the_images(folder):
    (folder / "a.txt").write_text("a dragon\n\n  a red tile \n")
    (folder / "b.json").write_text('{"captions": ["one", "two"], "class": "x"}')
    (folder / "c.json").write_text('{"caption": "alone"}')
    assert captions_of(items(folder)) == [["a dragon", "a red tile"], ["one", "two"], ["alone"]]
    (folder / "b.json").unlink()
    with pytest.raises(UserError) as error:
        captions_of(items(folder))
    one_line(error, "1 of 3", "b.png", "NAME.txt")


def test_captions_lie_in_shards(folder):
    with tarfile.open(folder / "set.tar", "w") as tar:
        for name in "ab":
            (folder / f"{name}.txt").write_text(f"caption of {name}")
            tar.add(folder / f"{name}.png", f"deep/{name}.png")
            tar.add(folder / f"{name}.txt", f"deep/{name}.txt")
    found = captions_of(list_shards([str(folder / "set.tar")]).items)
    assert found == [["caption of a"], ["caption of b"]]


TABLES = {
    "t.csv": 'image,caption\nc.png,third\na.png,"first, with a comma"\nb.png,second\n',
    "t.tsv": "filepath\ttitle\nx/c.png\tthird\nx/a.png\tfirst, with a comma\nx/b.png\tsecond\n",
    "t.json": '{"c": "third", "a": "first, with a comma", "b": ["second"]}',
    "list.json": json.dumps(
        [
            {"file_name": "c.png", "text": "third"},
            {"file_name": "b.png", "text": "second"},
            {"file_name": "a.png", "text": "first, with a comma"},
        ]
    ),
    "t.jsonl": '{"id": "b", "caption": "second"}\n\n{"id": "a", "caption": "first, with a comma"}\n'
    '{"id": "c", "captions": ["third"]}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_joined_by_name_and_not_by_order(folder, tmp_path_factory, name):
    table = tmp_path_factory.mktemp("table") / name
    table.write_text(TABLES[name])
    assert captions_of(items(folder), table) == [["first, with a comma"], ["second"], ["third"]]


def test_several_captions_in_a_row(tmp_path):
    (tmp_path / "t.csv").write_text("id,caption,caption_2,split\na,one,two,x\nb,three,,x\n")
    assert read_captions(tmp_path / "t.csv") == {"a": ["one", "two"], "b": ["three"]}


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("t.csv", "image,caption\na,x\nb,y\n", ["no caption for the image c.png"]),
        ("t.csv", "image,caption\na,x\nb,y\na,z\nc,w\n", ["names a twice"]),
        ("t.json", '{"a": "x", "b": "y", "a": "z", "c": "w"}', ["names a twice"]),
        ("t.json", '{"a": "x", "b": "y", "c": "z", "a.png": "w"}', ["the image a.png twice"]),
        ("t.json", '{"a": "x", "b": "  ", "c": "z"}', ["caption of b is empty"]),
        ("t.json", '{"a": "x", "b": 3, "c": "z"}', ["caption of b is empty or no text"]),
        ("t.json", '{"a": "x", "b": "y", "c": "z", "d": "w"}', ["for d", "no such image"]),
        ("t.json", '{"a": "x"', ["not JSON"]),
        ("t.json", "5", ["no JSON object"]),
        ("t.json", '"abc"', ["no JSON object"]),
        ("t.json", '["a", "b"]', ["entry 0", "no row"]),
        ("t.json", "[[1, 2]]", ["entry 0", "no row"]),
        ("t.csv", f"image,caption\na,{'x' * 140_000}\n", ["field larger than"]),
        ("t.json", "{}", ["no captions"]),
        ("t.csv", "picture,words\na,x\n", ["line 2", "names no image", "filepath"]),
        ("t.csv", "image,words\na,x\n", ["line 2", "no caption: a column of", "title"]),
        ("t.xlsx", "x", [".csv, .tsv, .json or .jsonl"]),
    ],
)
def test_bad_tables_are_refused_in_one_line(folder, tmp_path_factory, name, content, parts):
    table = tmp_path_factory.mktemp("table") / name
    table.write_text(content)
    with pytest.raises(UserError) as error:
        captions_of(items(folder), table)
    one_line(error, *parts)


def test_a_missing_table():
    with pytest.raises(UserError) as error:
        read_captions("nowhere.csv")
    one_line(error, "nowhere.csv", "check the path")


def test_a_name_that_several_images_share(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(pictures(1)[0][1])
    (tmp_path / ".t.json").write_text('{"a": "which?"}')
    with pytest.raises(UserError) as error:
        captions_of(items(tmp_path), tmp_path / ".t.json")
    one_line(error, "a names several images")
    (tmp_path / ".t.json").write_text('{"y/a": "second", "x/a.png": "first"}')
    assert captions_of(items(tmp_path), tmp_path / ".t.json") == [["first"], ["second"]]


@pytest.mark.parametrize(
    "table, parts",
    [
        ({"dog/000.png": "x", "cat/001.png": "y"}, ["dog/000.png", "no such image"]),
        ({"cat/000": "x", "dog/001.png": "y", "cat/001": "z"}, ["cat/001", "no such image"]),
        ({"cat/000": "x"}, ["no caption for the image dog/001.png"]),
    ],
)
def test_a_path_is_never_taken_for_another(tmp_path, table, parts):
    for name in ("cat/000.png", "dog/001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pictures(1)[0][1])
    (tmp_path / ".t.json").write_text(json.dumps(table))
    with pytest.raises(UserError) as error:
        captions_of(items(tmp_path), tmp_path / ".t.json")
    one_line(error, *parts)


def test_names_inside_shards(folder):
    for shard in "st":
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            tar.add(folder / "a.png", f"{shard}1.png")
            tar.add(folder / "b.png", "deep/2.png")
    found = list_shards([str(folder / f"{shard}.tar") for shard in "st"]).items
    table = {"s1": "a", "t.tar/t1": "b", "s.tar/deep/2": "c", "t.tar/deep/2.png": "d"}
    (folder / "t.json").write_text(json.dumps(table))
    assert captions_of(found, folder / "t.json") == [["a"], ["c"], ["b"], ["d"]]
    (folder / "t.json").write_text(json.dumps({**table, "deep/2": "e"}))
    with pytest.raises(UserError) as error:
        captions_of(found, folder / "t.json")
    one_line(error, "deep/2 names several images")


def test_text_goes_before_json_beside_an_image_and_in_a_shard(folder):
    (folder / "a.txt").write_text("of the text")
    (folder / "a.json").write_text('{"caption": "of the JSON", "keywords": null, "name": "x"}')
    with tarfile.open(folder / "s.tar", "w") as tar:
        for suffix in ("txt", "png", "json"):
            tar.add(folder / f"a.{suffix}", f"a.{suffix}")
    assert captions_of(list_shards([str(folder / "s.tar")]).items) == [["of the text"]]
    assert captions_of([item for item in items(folder) if item.name == "a.png"]) == [
        ["of the text"]
    ]


def test_captions_are_a_function_of_the_samples_seeds():
    images = open_images(DataConfig("emoji"), "heldout")
    pairs = Pairs(images, None, Tokenizer(500, 16))

    def drawn(seed, start, count):
        stream = pairs.drawn(batches(images, 8, seed=seed, start_step=start))
        return [next(stream) for _ in range(count)]

    first, again = drawn(0, 0, 3), drawn(0, 2, 1)
    assert torch.equal(first[2]["text"], again[0]["text"])
    assert torch.equal(first[2]["image"], again[0]["image"])
    other = first[2] | {"seed": first[2]["seed"] + 1}
    assert not torch.equal(next(pairs.drawn([other]))["text"], again[0]["text"])
    halves = [
        {key: x[rows] for key, x in first[2].items()} for rows in ([0, 1, 2], [3, 4, 5, 6, 7])
    ]
    joined = torch.cat([half["text"] for half in pairs.drawn(halves)])
    assert torch.equal(joined, first[2]["text"])  # however a batch is shared out
    captions = pairs.captions
    seen = set()
    for batch in drawn(0, 0, 40):
        for index, ids, number in zip(batch["index"], batch["text"], batch["caption"], strict=True):
            own = captions[index]
            ids_of_own = Tokenizer(500, 16)(own)
            which = (ids_of_own == ids).all(1).nonzero()[:, 0].tolist()
            assert which
            seen.add((int(index), which[0]))
            assert 0 <= int(number) < 2**56
    assert len(seen) > 1.2 * len({index for index, _ in seen})  # each draw is another


def test_equal_captions_have_equal_numbers():
    images = open_images(DataConfig("emoji"), "heldout")
    pairs = Pairs(images, None, Tokenizer(500, 16))
    pairs.captions = [["same"] if i % 2 else [f"other {i}"] for i in range(len(images))]
    batch = next(pairs.first(in_order(images, 6)))
    numbers = batch["caption"].tolist()
    assert numbers[1] == numbers[3] == numbers[5] and len(set(numbers)) == 4
    assert torch.equal(batch["captions"][:, 0], batch["caption"])
    assert (batch["captions"][:, 1:] == -1).all()
    assert len(pairs.texts) == 95 + 1
