"""The bundled emoji set: complete, split without a leak, and what the script makes."""

import hashlib
import io
import json
import tarfile

import pytest
from PIL import Image

from maskgit.assets.emoji import render
from maskgit.assets.emoji.render import Emoji
from maskgit.common.folder import ASSETS

FOLDER = ASSETS / "emoji" / "data"
SPLITS = ("train", "train-tones", "heldout", "heldout-tones")
INFO = json.loads((FOLDER / "info.json").read_text())


def read_shard(split):
    """[(emoji, RGB image, keywords)] in the shard's order."""
    samples = []
    with tarfile.open(FOLDER / f"emoji-{split}.tar") as tar:
        for png in [name for name in tar.getnames() if name.endswith(".png")]:
            record = json.loads(tar.extractfile(png.removesuffix("png") + "json").read())
            emoji = Emoji(record["emoji"], record["name"], record["class"])
            assert png == f"{emoji.key}.png"
            image = Image.open(io.BytesIO(tar.extractfile(png).read())).convert("RGB")
            samples.append((emoji, image, record["keywords"]))
        assert len(tar.getnames()) == 2 * len(samples)
    return samples


@pytest.fixture(scope="module")
def shards():
    return {split: read_shard(split) for split in SPLITS}


def test_the_set_is_complete_and_as_info_says(shards):
    assert {split: len(samples) for split, samples in shards.items()} == INFO["drawings"]
    assert sum(INFO["drawings"].values()) == 3655
    assert INFO["lacking"] == 0
    emoji = [e for samples in shards.values() for e, _, _ in samples]
    assert len({e.key for e in emoji}) == len({e.text for e in emoji}) == 3655
    assert {e.group for e, _, _ in shards["train"]} == set(INFO["classes"])
    assert len(INFO["classes"]) == 99
    assert set(INFO["no_mirror"]) < set(INFO["classes"])
    assert INFO["no_mirror"] == render.NO_MIRROR
    for split, samples in shards.items():
        for group, number in INFO["per_class"][split].items():
            assert sum(e.group == group for e, _, _ in samples) == number
        assert sum(INFO["per_class"][split].values()) == len(samples)
        assert all(e.toned == split.endswith("tones") for e, _, _ in samples)


def test_every_drawing_fills_its_picture_on_white(shards):
    for samples in shards.values():
        for emoji, image, keywords in samples:
            assert image.size == (64, 64)
            assert all(isinstance(word, str) and word for word in keywords)
            lightest = max(image.getpixel(at)[0] for at in ((0, 0), (63, 0), (0, 63), (63, 63)))
            assert lightest == 255, emoji
            left, top, right, bottom = Image.eval(image, lambda v: 255 - v).getbbox()
            extent = max(right - left, bottom - top)
            assert extent >= 12 if emoji.group == "geometric" else extent >= 28, emoji
    described = [keywords for _, _, keywords in shards["train"] if keywords]
    assert len(described) > 0.96 * len(shards["train"])  # others: just their name, or too new


def test_the_split_follows_from_names_and_pixels_alone(shards):
    samples = [(split, e, image) for split in SPLITS for e, image, _ in shards[split]]
    emoji = [e for _, e, _ in samples]
    concepts = render.group_concepts(emoji, [image.tobytes() for _, _, image in samples])
    chosen = render.held_out(emoji, concepts)
    for (split, e, _), concept in zip(samples, concepts, strict=True):
        assert split.startswith("heldout" if concept in chosen else "train"), e


def test_nothing_held_out_is_in_training(shards):
    trained = [s for split in ("train", "train-tones") for s in shards[split]]
    held = [s for split in ("heldout", "heldout-tones") for s in shards[split]]
    assert not {i.tobytes() for _, i, _ in trained} & {i.tobytes() for _, i, _ in held}
    concepts = {render.concept_of(e.name) for e, _, _ in trained}
    assert not concepts & {render.concept_of(e.name) for e, _, _ in held}
    for group in INFO["classes"]:
        here = {render.concept_of(e.name) for e, _, _ in trained if e.group == group}
        there = {render.concept_of(e.name) for e, _, _ in held if e.group == group}
        assert here
        assert there or len(here) < 5
    assert 0.08 < len(shards["heldout"]) / 1870 < 0.12


def test_concepts_and_their_groups():
    same = ["woman cook: dark skin tone", "man cook", "cook", "cook: medium-light skin tone"]
    assert {render.concept_of(name) for name in same} == {"cook"}
    assert render.concept_of("people holding hands: light skin tone, dark skin tone") == (
        render.concept_of("woman and man holding hands")
    )
    assert render.concept_of("woman: medium skin tone, red hair") == "red hair"
    assert render.concept_of("keycap: #") != render.concept_of("keycap: *")
    assert render.concept_of("flag: France") != render.concept_of("flag: Spain")
    emoji = [
        Emoji(text, name, "x") for text, name in zip("abcd", ("a", "b", "c", "d"), strict=True)
    ]
    groups = render.group_concepts(emoji, [b"1", b"2", b"1", b"3"])
    assert groups[0] == groups[2]
    assert len(set(groups)) == 3


def test_a_class_is_held_out_by_a_tenth():
    for size, expected in ((1, 0), (4, 0), (5, 1), (14, 1), (30, 3)):
        emoji = [Emoji(chr(97 + i), f"n{i}", "x") for i in range(size)]
        assert len(render.held_out(emoji, [e.name for e in emoji])) == expected


def test_the_data_is_small_and_licensed():
    sizes = [file.stat().st_size for file in FOLDER.iterdir()]
    assert sum(sizes) < 13e6
    for name, words in {
        "LICENSE-APACHE-2.0.txt": "Apache License",
        "LICENSE-NOTO-EMOJI.txt": "SIL OPEN FONT LICENSE",
        "LICENSE-UNICODE.txt": "Unicode, Inc.",
    }.items():
        assert words in (FOLDER / name).read_text("utf-8")


@pytest.mark.slow
def test_the_script_draws_the_same_pixels(shards):
    """Needs Debian's packages: where they are missing, the failure says how to install them."""
    render.open_font()
    assert hashlib.sha256(render.FONT.read_bytes()).hexdigest() == INFO["font_sha256"], (
        "another version of the font: draw the set again with render.py, and train on it"
    )
    splits, lacking = render.make_set()
    assert lacking == 0
    keywords = render.read_keywords()
    for split, samples in splits.items():
        assert [e for e, _ in samples] == [e for e, _, _ in shards[split]]
        for (e, drawn), (_, kept, words) in zip(samples, shards[split], strict=True):
            assert drawn.tobytes() == kept.tobytes(), e
            assert set(words) <= set(keywords.get(e.text.replace("\ufe0f", ""), [])), e
