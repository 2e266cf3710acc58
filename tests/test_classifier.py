"""The classifier: its features, its training, and what the training varies."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import first_loss, pictures
from PIL import Image

from maskgit.commands.main import main
from maskgit.common import UserError
from maskgit.common.folder import read_json
from maskgit.engine.data import DataConfig, in_order, open_images
from maskgit.evaluation.classifier import Classifier, ClassifierConfig
from maskgit.evaluation.classifier_task import ClassifierLossConfig, ClassifierTask, vary

STILL = ClassifierLossConfig(label_smoothing=0.0, turn=0, zoom=0, shift=0, gamma=0)


def tiny(**changes) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(**{"num_classes": 7, "widths": [8, 16, 24], **changes}))


@pytest.fixture(scope="module")
def drawings() -> dict[str, torch.Tensor]:
    """Fourteen held-out drawings, two to each of seven made-up classes."""
    images = open_images(DataConfig("emoji"), "heldout")
    batch = next(in_order(images, 14))
    return {"image": batch["image"], "label": torch.arange(14) // 2, "seed": torch.arange(14)}


def test_features_are_those_that_the_logits_are_made_of(drawings):
    model = tiny()
    images = drawings["image"] / 255
    features = model.features(images)
    assert features.shape == (14, 24) and features.dtype == torch.float32
    assert torch.equal(model(images), F.linear(features, model.head.weight, model.head.bias))
    assert model(images).shape == (14, 7)
    one_by_one = torch.cat([model.features(image[None]) for image in images])
    assert torch.allclose(one_by_one, features, atol=1e-5)
    assert (features.std(0) > 0).all()


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (7, 5), (256, 256)])
def test_images_of_any_size_are_brought_to_the_own(size):
    model, image = tiny(size=32), torch.rand(1, 3, *size)
    resized = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    assert torch.allclose(model(image), model(resized), atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_levels_halve_the_image(blocks):
    model = tiny(blocks=blocks)
    assert len(model.blocks) == 3 * blocks
    assert model.blocks(model.stem(torch.rand(1, 3, 64, 64))).shape == (1, 24, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [12]}, "groups=8 must divide"),
        ({"widths": []}, "groups=8 must divide"),
        ({"blocks": 0}, "blocks=0"),
        ({"size": 4}, "size=4"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_saved_and_loaded(tmp_path, drawings):
    model, images = tiny(), drawings["image"] / 255
    ClassifierTask(model, STILL, list("abcdefg")).export(model, tmp_path)
    assert read_json(tmp_path / "labels.json") == list("abcdefg")
    for folder in (tmp_path, tmp_path / "classifier"):
        loaded = Classifier.from_pretrained(folder)
        assert loaded.config == model.config and not loaded.training
        assert torch.equal(loaded(images), model(images))
    model.save_pretrained(tmp_path / "half", half=True)
    loaded = Classifier.from_pretrained(tmp_path / "half")
    assert loaded.head.weight.dtype == torch.float32
    assert torch.allclose(loaded(images), model(images), atol=0.02)


def test_varied_images_follow_from_their_seeds_and_keep_their_ground(drawings):
    images, seeds = drawings["image"] / 255, torch.arange(14)
    assert torch.allclose(vary(images, STILL, seeds), images, atol=1e-5)
    varied = vary(images, ClassifierLossConfig(), seeds)
    assert torch.equal(vary(images, ClassifierLossConfig(), seeds), varied)
    assert torch.allclose(vary(images[5:7], ClassifierLossConfig(), seeds[5:7]), varied[5:7])
    assert not torch.allclose(vary(images, ClassifierLossConfig(), seeds + 1), varied, atol=0.01)
    assert vary(images.double(), ClassifierLossConfig(), seeds).dtype == torch.float64
    assert varied.shape == images.shape and varied.min() >= 0 and varied.max() <= 1
    assert ((varied - images).abs().mean((1, 2, 3)) > 0.005).all()
    white = vary(torch.ones(4, 3, 16, 16), ClassifierLossConfig(), torch.arange(4))
    assert torch.allclose(white, torch.ones(1))


def test_shifts_and_turns_are_as_far_as_they_say():
    image = torch.zeros(200, 3, 64, 64)
    image[:, :, 24:40, 24:40] = 1  # its middle is the image's
    grid = (torch.arange(64.0) - 31.5) / 64

    def offset(**changes):
        config = ClassifierLossConfig(**{**vars(STILL), **changes})
        varied = vary(image, config, torch.arange(200))[:, 0]
        mass = varied.sum((1, 2))
        middle = torch.stack([(varied * grid).sum((1, 2)), (varied * grid[:, None]).sum((1, 2))])
        return (middle / mass).abs(), mass / 256

    middle, _ = offset(shift=0.1)
    assert 0.09 < middle.max() < 0.101
    middle, _ = offset(turn=30)
    assert middle.max() < 1e-3
    _, area = offset(zoom=0.2)
    assert 1.4 < area.max() < 1.55 and 0.64 < area.min() < 0.72  # exp(0.4), exp(-0.4)


def test_learns_a_few_drawings_by_heart(drawings):
    task = ClassifierTask(tiny(), STILL, list("abcdefg"))
    model = task.parts["classifier"]
    before = task.validate(model, [drawings])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        name, loss, *_ = first_loss(task, drawings, step=step)
        assert name == "classifier"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.validate(model, [drawings])
    assert after["top1"] == 1 > before["top1"]
    assert after["loss"] < 0.2 < before["loss"]


def test_validation_counts_over_batches_of_any_size(drawings):
    task = ClassifierTask(tiny(), ClassifierLossConfig(), list("abcdefg"))
    model = task.parts["classifier"]
    halves = [{k: v[part] for k, v in drawings.items()} for part in (slice(5), slice(5, 14))]
    logits, labels = model(drawings["image"] / 255), drawings["label"]
    expected = {
        "loss": F.cross_entropy(logits, labels).item(),
        "top1": (logits.argmax(1) == labels).float().mean().item(),
        "top5": (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item(),
    }
    assert task.validate(model, halves) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="no image"):
        task.validate(model, [])


def test_draws_the_hardest_images_first(drawings):
    task = ClassifierTask(tiny(), STILL, list("abcdefg"))
    model = task.parts["classifier"]
    sheet = task.draw(model, drawings)
    images, labels = drawings["image"] / 255, drawings["label"]
    hardest = F.cross_entropy(model(images), labels, reduction="none").argmax()
    assert torch.allclose(sheet[:, 2:66, 2:66], images[hardest])
    assert sheet.shape == (3, 2 * 66 + 2, 8 * 66 + 2)


def test_own_pictures_need_classes(tmp_path, capsys):
    for name, content in pictures(12):
        (tmp_path / name).write_bytes(content)
    assert main(["train", "emoji_classifier", f"data.path={tmp_path}", f"run={tmp_path}"]) == 2
    assert "has no classes" in capsys.readouterr().err


@pytest.mark.slow
def test_own_pictures_of_two_classes_are_told_apart_and_init_goes_on(forked, tmp_path):
    generator = np.random.default_rng(0)
    for i in range(40):
        pixels = generator.integers(0, 100, (32, 24, 3), dtype=np.uint8)
        pixels[..., i % 2] += 150
        (tmp_path / "own" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "own" / "ab"[i % 2] / f"{i}.png")
    settings = [f"data.path={tmp_path / 'own'}", "train.steps=10", "train.batch_size=8"]
    settings += ["data.size=[32, 24]", "data.heldout=0.2", "train.warmup=1", "train.ema=0"]
    first, second = tmp_path / "first", tmp_path / "second"
    done = forked("train", "emoji_classifier", "--smoke", *settings, f"run={first}")
    assert done.returncode == 0 and re.search(r"heldout/top1 1\b", done.stdout), done.stderr
    assert Classifier.from_pretrained(first / "export").config.num_classes == 2
    more = [f"run={second}", f"init={first / 'export'}", "train.lr=1e-9"]
    done = forked("train", "emoji_classifier", "--smoke", *settings, *more)
    assert done.returncode == 0 and re.search(r"heldout/top1 1\b", done.stdout), done.stderr
