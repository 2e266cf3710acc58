"""Zero-shot, retrieval and intervals: against direct computation."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from torch.overrides import TorchFunctionMode

from clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from clip.zero_shot import (
    check_templates,
    class_weights,
    effective_count,
    imagenet,
    published,
    retrieval,
    templates,
    wilson,
    zero_shot,
)
from maskgit.common import UserError


def units(count, width=16, seed=0):
    features = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(features, dim=-1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    image = ImageConfig(size=[32, 32], patch=16, width=32, depth=1, heads=2)
    text = TextConfig(merges=500, context=24, width=32, depth=2, heads=2)
    return CLIP(CLIPConfig(embed=16, image=image, text=text)).eval()


# Class weights


def test_class_weights_normalise_mean_and_normalise(model):
    names, prompts = ["cat", "red dog", "a {} of braces"], ["a photo of a {}.", "{}", "the {}, big"]
    weights = class_weights(model, iter(names), prompts)
    assert weights.shape == (3, 16) and not weights.requires_grad
    for name, row in zip(names, weights, strict=True):
        texts = [a + name + b for a, b in (p.split("{}") for p in prompts)]
        with torch.no_grad():
            raw = model.encode_text(model.tokenize(texts), normalize=False)
        mean = (raw / raw.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_many_classes_and_many_templates_are_encoded_in_parts(model):
    names = [f"thing {i}" for i in range(300)]
    weights = class_weights(model, names)
    direct = model.encode_text(model.tokenize(names)).detach()
    torch.testing.assert_close(weights, direct, rtol=1e-5, atol=1e-6)
    prompts = [f"{i} {{}}" for i in range(260)]  # more than are encoded at a time
    direct = model.encode_text(model.tokenize([p.format("cat") for p in prompts])).detach()
    one = F.normalize(direct.mean(0), dim=-1)
    torch.testing.assert_close(class_weights(model, ["cat"], prompts)[0], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [["a photo"], ["a {} or {}"], [], ["{}", "a {0}"]])
def test_templates_need_one_place_for_the_name(bad):
    with pytest.raises(UserError) as error:
        check_templates(bad, "prompts.txt")
    one_line(error, "prompts.txt")


def test_no_classes_are_refused(model):
    with pytest.raises(UserError) as error:
        class_weights(model, [])
    one_line(error, "no classes")


# Zero-shot


def test_zero_shot_by_hand():
    features, weights = units(300, seed=1), units(9, seed=2)
    labels = torch.arange(300) ** 2 % 9  # not all classes have images
    found = zero_shot(features, weights, labels, 20.0)
    cosines = features.double() @ weights.double().T
    order = cosines.argsort(1, descending=True)
    right = order == labels[:, None]
    assert found.top1 == pytest.approx(right[:, :1].any(1).double().mean().item())
    assert found.top5 == pytest.approx(right[:, :5].any(1).double().mean().item())
    means = [right[labels == k, 0].double().mean().item() for k in labels.unique()]
    assert found.per_class == pytest.approx(np.mean(means))
    assert found.counts == labels.bincount(minlength=9).tolist() and 0 in found.counts
    probabilities = (20 * cosines).exp() / (20 * cosines).exp().sum(1, keepdim=True)
    torch.testing.assert_close(found.probabilities.double(), probabilities, rtol=1e-4, atol=1e-6)
    nll = -probabilities[torch.arange(300), labels].log().mean().item()
    assert found.cross_entropy == pytest.approx(nll, rel=1e-4)


def test_probabilities_are_by_the_learned_temperature(model):
    features, weights = units(20, seed=3), units(4, seed=4)
    scale = model.logit_scale.detach().exp()
    found = zero_shot(features, weights, torch.zeros(20, dtype=torch.int64), scale)
    direct = (scale * features @ weights.T).softmax(1)
    torch.testing.assert_close(found.probabilities, direct)
    assert math.isclose(float(scale), 1 / 0.07, rel_tol=1e-5)


def test_classes_of_one_name_share_their_place():
    weights = units(6, seed=5)
    weights[1] = weights[0]
    found = zero_shot(weights.clone(), weights, torch.arange(6), 1.0)
    assert found.top1 == pytest.approx((4 + 2 * 0.5) / 6) and found.top5 == 1
    blind = torch.ones(6, 16) / 4  # a model that says the same of everything: chance
    found = zero_shot(blind, blind, torch.arange(6), 1.0)
    assert found.top1 == pytest.approx(1 / 6) and found.top5 == pytest.approx(5 / 6)


def test_features_that_are_not_finite_find_nothing():
    weights = units(6, seed=6)
    found = zero_shot(weights * torch.nan, weights, torch.arange(6), 1.0)
    assert found.top1 == found.top5 == 0
    recall = retrieval(weights * torch.nan, weights, torch.arange(6), at=(1, 5))
    assert set(recall.values()) == {0}


@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((5, 8), [0] * 5),
        ((5, 16), [0] * 4),
        ((5, 16), [0, 1, 2, 3, 4]),
        ((5, 16), [-1, 0, 0, 0, 0]),
    ],
)
def test_what_does_not_fit_is_refused(shape, labels):
    with pytest.raises(UserError) as error:
        zero_shot(torch.ones(shape), units(3), torch.tensor(labels), 1.0)
    one_line(error, "do not fit")


# Retrieval


def dense_recall(images, texts, owner, k):
    """From the whole matrix, sorted."""
    cosines = images @ texts.T
    right = owner[None] == torch.arange(len(images))[:, None]
    to_text = right.gather(1, cosines.argsort(1, descending=True)[:, :k]).any(1)
    to_image = right.T.gather(1, cosines.T.argsort(1, descending=True)[:, :k]).any(1)
    return to_text.double().mean().item(), to_image.double().mean().item()


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_retrieval_equals_the_dense_computation(block):
    generator = torch.Generator().manual_seed(7)
    images = units(60, seed=8)
    extra = torch.randint(60, (150,), generator=generator)  # 1 to about 6 captions an image
    owner = torch.cat([torch.arange(60), extra])[torch.randperm(210, generator=generator)]
    texts = F.normalize(images[owner] + 0.4 * torch.randn(210, 16, generator=generator), dim=-1)
    found = retrieval(images, texts, owner, at=(1, 5, 10), block=block)
    assert len(found) == 6
    for k in (1, 5, 10):
        direct = dense_recall(images, texts, owner, k)
        assert (found[f"image_to_text@{k}"], found[f"text_to_image@{k}"]) == pytest.approx(direct)
    assert 0.2 < found["text_to_image@1"] < found["text_to_image@10"] < 1


def test_ties_do_not_count_for_the_model():
    blind = F.normalize(torch.ones(12, 16), dim=-1)
    assert set(retrieval(blind, blind, torch.arange(12), at=(1, 5, 10)).values()) == {0}
    images = units(8, seed=9)
    texts = images.clone()
    texts[1] = texts[0]  # two images with one caption
    found = retrieval(images, texts, torch.arange(8), at=(1, 2))
    assert found["image_to_text@1"] == 6 / 8  # neither image 0 (a tie) nor image 1 (not its own)
    assert found["text_to_image@1"] == 7 / 8  # the text is nearer to image 0 alone
    # an image's own captions do not stand in each other's way
    twice = torch.cat([images, images])
    found = retrieval(images, twice, torch.arange(16) % 8, at=(1,))
    assert set(found.values()) == {1}


class Largest(TorchFunctionMode):
    """The most elements that any tensor had that was computed in the meantime."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_memory_does_not_grow_with_the_cosines():
    images, texts = units(500, 4, seed=10), units(1500, 4, seed=11)
    with Largest() as largest:
        retrieval(images, texts, torch.arange(1500) % 500, block=50)
    assert largest.elements <= texts.numel() < 500 * 1500


@pytest.mark.parametrize(
    ("owner", "why"),
    [([0, 0, 1], "have no caption"), ([0, 1, 3], "owners"), ([0, 1], "owners"), ([], "owners")],
)
def test_retrieval_needs_a_caption_of_each_image(owner, why):
    with pytest.raises(UserError) as error:
        retrieval(units(3), units(3), torch.tensor(owner, dtype=torch.int64))
    one_line(error, why)


def test_features_of_two_models_are_refused():
    with pytest.raises(UserError) as error:
        retrieval(units(3, 16), units(3, 8), torch.arange(3))
    one_line(error, "(3, 16)", "(3, 8)", "one model")


# Intervals and facts


def test_wilson_by_hand_and_at_the_ends():
    # The roots of (p - share)^2 = z^2 p (1 - p) / n, which define the interval.
    for share, n in ((0.3, 50), (0.0, 20), (1.0, 20), (0.5, 1), (0.123, 1234.5)):
        low, high = wilson(share, n)
        z2 = 1.959963984540054**2
        roots = np.sort(np.roots([1 + z2 / n, -2 * share - z2 / n, share**2]).real)
        assert (low, high) == pytest.approx(tuple(roots), abs=1e-6)
        assert 0 <= low <= share <= high <= 1
    assert wilson(0.5, 100, 0.99)[0] < wilson(0.5, 100, 0.9)[0]
    with pytest.raises(ValueError):
        wilson(0.5, 0)


def test_wilson_covers_the_truth_as_often_as_it_says():
    hits = np.random.default_rng(0).binomial(80, 0.1, 3000)
    covered = [low <= 0.1 <= high for low, high in (wilson(h / 80, 80) for h in hits)]
    assert 0.93 < np.mean(covered) < 0.97


def test_a_mean_of_classes_is_worth_fewer_trials():
    assert effective_count([10, 10, 10]) == pytest.approx(30)
    assert effective_count([0, 10, 10]) == pytest.approx(20)
    assert effective_count([1, 1000]) == pytest.approx(4, rel=0.01)


def test_imagenets_facts_are_those_of_open_clip():
    path = Path(importlib.util.find_spec("open_clip").origin).parent / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("zero_shot_metadata", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    assert imagenet()["names"] == list(theirs.IMAGENET_CLASSNAMES)
    for name, lambdas in (
        ("imagenet", theirs.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet7", theirs.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert templates(name) == [f("{}") for f in lambdas]
        check_templates(templates(name))
    assert (len(imagenet()["names"]), len(templates("imagenet"))) == (1000, 80)
    assert set(templates("imagenet7")) < set(templates("imagenet"))
    assert "MIT" in imagenet()["source"] and "arXiv:2103.00020" in imagenet()["source"]


def test_what_was_published_is_of_known_weights_and_imagenet_alone():
    names = imagenet()["names"]
    assert published("ViT-B-32/openai", names) == pytest.approx(0.632)
    assert published("ViT-B-32/openai", names[:999]) is None
    assert published("ViT-B-32 laion2b_s34b_b79k", names) is None
    assert published("", names) is None
    with pytest.raises(UserError) as error:
        templates("imagenet8")
    one_line(error, "did you mean 'imagenet'")
