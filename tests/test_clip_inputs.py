"""What `maskgit evaluate clip` is given: sets, names, prompts and lists, and the chance of each."""

import json

import numpy as np
import pytest
from conftest import one_line

from clip.texts import spoken
from maskgit.common import UserError
from maskgit.common.folder import ASSETS
from maskgit.evaluation.clip_inputs import read_list, resolve, ways_to_prompt
from maskgit.evaluation.clip_tasks import chance_of
from maskgit.evaluation.prompts import class_texts, described


def test_the_train_set_of_the_bundled_one_is_the_training_drawings():
    found = resolve("emoji:heldout")
    assert found.tasks == ["zero-shot", "retrieval", "probe", "few-shot"]
    assert found.train.name == "emoji" and found.train.classes == found.data.classes
    assert len(found.train_labels) == len(found.train.items) > 1500
    assert "probe" in resolve("emoji").left_out


def test_equal_ways_of_making_prompts_are_measured_once():
    names = ["sea", "land"]
    assert ways_to_prompt(names, names, ["{}"], "mine.txt") == {"bare name": (names, ["{}"])}
    ways = ways_to_prompt(names, names, ["a {}"], "mine.txt")
    assert list(ways) == ["bare name", "one template"]


def test_the_bundled_classes_are_described_in_words_of_captions():
    classes = list(described())
    assert sorted(classes) == sorted(json.loads((ASSETS / "emoji" / "labels.json").read_text()))
    names = class_texts(classes)
    assert "cat face" in names[classes.index("cat-face")]
    assert all(names) and all(text.strip() for own in names for text in own)
    ways = ways_to_prompt(classes, names, ["a photo of a {}."], None)
    assert ways == {
        "class name": ([spoken(name) for name in classes], ["{}"]),
        "described": (names, ["{}"]),
    }
    assert set(ways_to_prompt(classes, names, ["my {}"], "mine.txt")) == {
        "bare name",
        "one template",
    }
    assert class_texts(["cat-face", "music"]) == ["cat face", "music"]  # a folder of one's own


def test_lists_come_as_lines_or_json(tmp_path):
    (tmp_path / "a.txt").write_text("\ufefffirst\n\n second one \n", encoding="utf-8")
    assert read_list(str(tmp_path / "a.txt")) == ["first", "second one"]
    (tmp_path / "a.json").write_text('["b", "a"]')
    assert read_list(str(tmp_path / "a.json")) == ["b", "a"]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError) as error:
        read_list(str(tmp_path / "b.txt"))
    one_line(error, "b.txt", "UTF-8")


def test_chance_is_what_a_random_order_gives():
    captions, k = [1, 3, 1, 2], 2
    owner = np.repeat(np.arange(4), captions)
    random = np.random.default_rng(0)
    hits = np.zeros(4)
    for _ in range(4000):
        first = set(owner[random.permutation(7)[:k]])
        hits += [i in first for i in range(4)]
    assert chance_of("image_to_text", captions, k) == pytest.approx(hits.mean() / 4000, abs=0.02)
    assert chance_of("text_to_image", captions, k) == 0.5
    assert chance_of("image_to_text", [1, 1], 10) == chance_of("text_to_image", [1, 1], 10) == 1
