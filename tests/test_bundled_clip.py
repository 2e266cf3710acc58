"""The bundled CLIP keeps what the header of its config says, and its scores mean something."""

import pytest
import torch
import yaml
from conftest import ROOT
from test_bundled import stated

from clip import CLIP
from clip.score import clip_score, encode_images
from clip.texts import encode_texts
from clip.zero_shot import class_weights, retrieval, wilson, zero_shot
from maskgit import Pipeline
from maskgit.common.folder import ASSETS
from maskgit.engine.captions import captions_of
from maskgit.engine.data import DataConfig, in_order, open_images
from maskgit.evaluation.classifier import Classifier
from maskgit.evaluation.prompts import class_texts
from maskgit.evaluation.protocol import class_counts

GENERATED = 198  # two of each class


@pytest.fixture(scope="module")
def model():
    return CLIP.from_pretrained("emoji")


@pytest.fixture(scope="module")
def heldout():
    """The held-out drawings: images in [0, 1], labels, names of the classes, names of each."""
    images = open_images(DataConfig("emoji"), "heldout")
    batch = next(in_order(images, len(images)))
    names = [own[0] for own in captions_of(images.items)]
    return batch["image"] / 255, batch["label"], images.classes, names


@pytest.fixture(scope="module")
def features(model, heldout):
    return encode_images(model, heldout[0].split(64))  # (189, E)


@pytest.fixture(scope="module")
def weights(model, heldout):
    return class_weights(model, class_texts(heldout[2]))  # (99, E)


def test_its_size_and_shape(model):
    file = ASSETS / "emoji" / "clip" / "model.safetensors"
    assert file.stat().st_size < 6e6
    described = yaml.safe_load((ROOT / "configs" / "emoji_clip.yaml").read_text())["model"]
    for key, value in described.items():
        own = getattr(model.config, key)
        if isinstance(value, dict):
            assert {name: getattr(own, name) for name in value} == value
        else:
            assert own == value


def test_zero_shot_against_the_classifier(model, heldout, features, weights):
    """At least 0.7 of its top-1, with and without the country flags, one drawing in seven."""
    images, labels, classes, _ = heldout
    with torch.no_grad():
        guessed = Classifier.from_pretrained("emoji")(images).argmax(1) == labels
    flags = labels == classes.index("country-flag")
    for some, words in ((labels >= 0, "described"), (~flags, "without the country flags")):
        found = zero_shot(features[some], weights, labels[some], model.logit_scale.exp().item())
        assert found.top1 >= 0.7 * guessed[some].float().mean()
        number = stated("emoji_clip", rf"{words}[^%]*? top-1 (\d+\.\d) %")
        assert 100 * found.top1 == pytest.approx(number, abs=0.7)  # one drawing
    plain = class_weights(model, [name.replace("-", " ") for name in classes])
    found = zero_shot(features, plain, labels, model.logit_scale.exp().item())
    number = stated("emoji_clip", r"bare names of the classes,? top-1 (\d+\.\d) %")
    assert 100 * found.top1 == pytest.approx(number, abs=0.7)


def test_retrieval_against_chance(model, heldout, features):
    """Recall@10 of images to names is at least 4 times chance, by its 95 % interval."""
    text = encode_texts(model, heldout[3])
    found = retrieval(features, text, torch.arange(len(text)))["image_to_text@10"]
    low, _ = wilson(found, len(text))
    assert low >= 4 * 10 / len(text)
    number = stated("emoji_clip", r"recall@10 (\d+\.\d) %")
    assert 100 * found == pytest.approx(number, abs=0.7)


def standard_errors(image, weights, labels):
    """By how many the score with the right class is above that with a wrong one, drawn by lot."""
    shift = torch.randint(1, len(weights), labels.shape, generator=torch.Generator().manual_seed(0))
    right, wrong = (
        clip_score(image, weights[own], "cosine")
        for own in (labels, (labels + shift) % len(weights))
    )
    difference = right - wrong
    return float(difference.mean() / difference.std() * len(labels) ** 0.5), float(right.mean())


def test_held_out_drawings_score_higher_with_their_class(heldout, features, weights):
    errors, mean = standard_errors(features, weights, heldout[1])
    assert errors >= 5
    number = stated("emoji_clip", r"held-out drawings (\d\.\d+)")
    assert mean == pytest.approx(number, abs=0.005)


def test_generated_images_score_higher_with_their_class(model, weights):
    pipe = Pipeline.from_pretrained("emoji", device="cpu", dtype="fp32")
    labels = torch.arange(GENERATED) % len(pipe.labels)
    assert set(class_counts(labels.tolist()).values()) == {2}
    images = (pipe.sample(labels.tolist(), seed=0) * 255).round() / 255
    errors, mean = standard_errors(encode_images(model, images.split(64)), weights, labels)
    assert errors >= 5
    number = stated("emoji_clip", r"generated images (\d\.\d+)")
    assert mean == pytest.approx(number, abs=0.01)


def test_the_readme_has_the_numbers_of_the_header():
    readme = (ROOT / "README.md").read_text()
    rows = {
        r"described[^%]*? top-1 (\d+\.\d) %": "each described by words of captions | {} % |",
        r"without the country flags,? top-1 (\d+\.\d) %": "without the country flags | {} % |",
        r"bare names of the classes,? top-1 (\d+\.\d) %": "the bare names of the classes | {} % |",
        r"recall@10 (\d+\.\d) %": "recall@10 | {} % |",
    }
    for pattern, row in rows.items():
        assert row.format(f"{stated('emoji_clip', pattern):.1f}") in readme
    held, drawn = (
        stated("emoji_clip", rf"{what} (0\.\d+)")
        for what in ("held-out drawings", "generated images")
    )
    assert f"right class | {held:.3f} | {drawn:.3f} of generated images |" in readme
