"""CLIP-score: closed forms of each convention, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import one_line
from pictures import picture
from PIL import Image

from clip import CLIP
from clip.score import (
    clip_score,
    ref_clip_score,
    score_images,
    summarise,
    texts_for,
)
from clip.texts import class_prompts
from maskgit.common import UserError
from maskgit.metadata import from_png, to_png


@pytest.fixture(scope="module")
def model(clip_folder):
    return CLIP.from_pretrained(clip_folder)


def at(*cosines):
    """Pairs of unit vectors with these cosines between them."""
    c = torch.tensor(cosines, dtype=torch.float64)
    return torch.tensor([[1.0, 0.0]]).double().expand(len(c), 2), torch.stack(
        [c, (1 - c**2).sqrt()], 1
    )


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("hessel", [2.5, 1.25, 0.0, 0.0]),
        ("percent", [100.0, 50.0, 0.0, -40.0]),
        ("cosine", [1.0, 0.5, 0.0, -0.4]),
    ],
)
def test_each_convention_of_known_cosines(convention, expected):
    scores = clip_score(*at(1.0, 0.5, 0.0, -0.4), convention)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_the_score_with_references_is_a_harmonic_mean():
    image, text = at(0.8, 0.8, -0.5, 0.8, 0.8)
    _, near = at(1.0)
    along = text[0]  # the references' cosines with the text, by turning the text itself
    across = torch.stack([-along[1], along[0]])
    references = [
        torch.stack([along * c + across * (1 - c * c) ** 0.5 for c in cosines])
        for cosines in ([0.5], [-0.2, 0.5, 0.1], [0.5], [-0.3], [1.0])
    ]
    references[2] = text[2:3] * 1.0
    found = ref_clip_score(image, text, references)
    mean = 2 * 2.0 * 0.5 / 2.5  # of 2.5 * 0.8 and 0.5
    expected = torch.tensor([mean, mean, 0.0, 0.0, 2 * 2.0 / 3.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    best = ref_clip_score(near, near, [near])  # cosine 1 throughout, between itself
    torch.testing.assert_close(best, torch.tensor([2 * 2.5 / 3.5], dtype=torch.float64))
    for bad, parts in ((references[:4], ["4", "5"]), ([*references[:4], text[:0]], ["text 4"])):
        with pytest.raises(UserError) as error:
            ref_clip_score(image, text, bad)
        one_line(error, *parts)


def test_the_summary_of_scores():
    values = np.random.default_rng(0).normal(0.6, 0.1, 200)
    found = summarise(torch.from_numpy(values))
    error = values.std(ddof=1) / np.sqrt(200)
    assert found["mean"] == pytest.approx(values.mean()) and found["n"] == 200
    assert found["standard_error"] == pytest.approx(error)
    assert found["interval"] == pytest.approx([values.mean() + s * 1.96 * error for s in (-1, 1)])
    alone = summarise(torch.tensor([0.5]))
    assert alone == {"mean": 0.5, "standard_error": None, "interval": None, "n": 1}
    with pytest.raises(UserError) as problem:
        summarise(torch.zeros(0))
    one_line(problem, "no scores")


def test_features_that_do_not_fit_are_refused():
    x = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    for a, b, part in (
        (x, x[:, :3], "(3, 4) and (3, 3)"),
        (x, x[:2], "(3, 4) and (2, 4)"),
        (x, x * torch.nan, "3 of 3 pairs are not finite"),
    ):
        with pytest.raises(UserError) as error:
            clip_score(a, b)
        one_line(error, part)
    with pytest.raises(UserError) as error:
        clip_score(x, x, "hesel")
    one_line(error, "did you mean 'hessel'")


def test_prefixes_and_prompts():
    assert texts_for([" a cat "], "hessel") == [["A photo depicts a cat"]]
    assert texts_for(["a cat"], "percent") == texts_for(["a cat"], "cosine") == [["a cat"]]
    with pytest.raises(UserError) as error:
        texts_for(["a cat", "  "], "hessel")
    one_line(error, "text 1 is empty")
    assert class_prompts(["cat face"]) == [["cat face"]]
    assert class_prompts(["cat", ["a", "b"]], ["{}!", "my {}"]) == [
        ["cat!", "my cat"],
        ["a!", "my a", "b!", "my b"],
    ]
    with pytest.raises(UserError) as error:
        class_prompts(["cat-face"], ["an emoji"])
    one_line(error, "needs {} once")


def test_images_are_scored_with_their_texts(model):
    images, texts = torch.rand(5, 3, 20, 24), ["a", "b", "a", "c " * 30, "d"]
    with torch.no_grad():
        image = model.encode_image(model.preprocess(images))
        text = model.encode_text(model.tokenize([f"A photo depicts {t.strip()}" for t in texts]))
    expected = 2.5 * (image * text).sum(1).clamp_min(0)
    found, cut = score_images(model, images.split(2), texts)
    torch.testing.assert_close(found, expected)
    assert cut == 1
    with pytest.raises(UserError) as error:
        score_images(model, [images], texts[:4])
    one_line(error, "5 images and 4 texts")
    with pytest.raises(UserError) as error:
        score_images(model, [], texts)
    one_line(error, "no images")


def test_a_record_travels_in_a_png(tmp_path):
    record = {"class": "Straße", "seed": 7, "rerank": {"cosine": 0.25}}
    (tmp_path / "a.png").write_bytes(to_png(picture(1), record))
    with Image.open(tmp_path / "a.png") as found:
        assert from_png(found) == record
        assert np.array_equal(np.asarray(found), np.asarray(picture(1)))
    for text in ("no JSON", "[1]"):
        other = picture(1)
        other.info["maskgit"] = text
        assert from_png(other) == {}
    assert from_png(picture(1)) == {}
