"""The bundled model keeps what the headers of its configs say: recomputed here, not quoted."""

import re
from functools import partial

import pytest
import torch
import yaml
from conftest import ROOT

from maskgit import Pipeline
from maskgit.common.folder import read_json
from maskgit.engine.data import DataConfig, in_order, open_images
from maskgit.engine.tokenize import cached
from maskgit.engine.tokens import fixed_batches
from maskgit.evaluation.classifier import Classifier
from maskgit.evaluation.classifier_task import ClassifierLossConfig, ClassifierTask
from maskgit.runs import ClassifierRun, CLIPRun, MaskGITRun, VQGANRun
from maskgit.task import MaskGITLossConfig, MaskGITTask
from maskgit.tokenized import token_stamp
from vqgan.discriminator import DiscriminatorConfig
from vqgan.task import VQGANLossConfig, VQGANTask


def stated(config: str, pattern: str) -> float:
    """The number in the header of a config that stands where `pattern` has its group."""
    header = re.match(r"(#.*\n)*", (ROOT / "configs" / f"{config}.yaml").read_text())[0]
    found = re.search(pattern, header.replace("\n# ", " "))
    assert found, f"the header of {config} does not say {pattern}"
    return float(found[1].replace(",", ""))


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained("emoji", device="cpu", dtype="fp32")


def test_tokenizer_on_the_held_out_drawings(pipe):
    heldout = open_images(DataConfig("emoji", mirror=False), "heldout")
    task = VQGANTask(pipe.vqgan, VQGANLossConfig(), DiscriminatorConfig(), 64)
    scores = task.validate(pipe.vqgan, in_order(heldout, 63))
    psnr = stated("emoji_decoder", r"189 held-out drawings: PSNR (\d+\.\d+) dB")
    assert scores["psnr"] == pytest.approx(psnr, abs=0.02)
    assert scores["psnr"] >= 22
    assert 100 * scores["usage"] == pytest.approx(
        stated("emoji_vqgan", r"(\d+\.\d+) % of the codes"), abs=0.3
    )
    assert scores["usage"] >= 0.7


@pytest.mark.parametrize(("split", "name"), [("train", "training"), ("heldout", "held-out")])
def test_transformer_on_training_and_held_out_drawings(pipe, split, name, tmp_path):
    images = open_images(DataConfig("emoji", mirror=False), split)
    task = MaskGITTask(pipe.transformer, MaskGITLossConfig(), pipe.vqgan, pipe.labels)
    stamp = token_stamp("emoji", pipe.vqgan, images)
    tokens = cached(tmp_path, stamp, images, pipe.vqgan.encode, torch.device("cpu"))
    scores = task.validate(pipe.transformer, fixed_batches(tokens, 63, 189))
    for metric, digits in (("accuracy", 0.003), ("loss", 0.02)):
        number = stated("emoji_maskgit", rf"{name} drawings:[^:]*?{metric} (\d+\.\d+)")
        assert scores[metric] == pytest.approx(number, abs=digits)


def test_classifier_on_the_held_out_drawings(pipe):
    heldout = open_images(DataConfig("emoji"), "heldout")
    model = Classifier.from_pretrained("emoji")
    task = ClassifierTask(model, ClassifierLossConfig(), pipe.labels)
    scores = task.validate(model, in_order(heldout, 63))
    for name in ("top-1", "top-5"):
        number = stated("emoji_classifier", rf"{name} accuracy (\d+\.\d+) %")
        assert 100 * scores[name.replace("-", "")] == pytest.approx(number, abs=0.6)  # one drawing
    assert scores["top1"] >= 0.4


def test_weights_are_what_the_configs_describe(pipe):
    configs = [ROOT / "configs" / f"emoji_{name}.yaml" for name in ("vqgan", "decoder")]
    described, again = (yaml.safe_load(config.read_text())["model"] for config in configs)
    assert described == again
    for key, value in described.items():
        if key != "quantizer":
            assert getattr(pipe.vqgan.config, key) == value
    described = yaml.safe_load((ROOT / "configs" / "emoji_maskgit.yaml").read_text())
    for key, value in described["model"].items():
        assert getattr(pipe.transformer.config, key) == value
    assert pipe.sampling == described["sampling"]
    described = yaml.safe_load((ROOT / "configs" / "emoji_classifier.yaml").read_text())["model"]
    classifier = Classifier.from_pretrained("emoji").config
    for key, value in described.items():
        assert getattr(classifier, key) == value
    assert classifier.num_classes == len(pipe.labels)
    assert pipe.sampling["steps"] == 8
    info = read_json(ROOT / "maskgit/assets/emoji/data/info.json")
    assert pipe.labels == info["classes"]
    vqgan = yaml.safe_load((ROOT / "configs" / "emoji_vqgan.yaml").read_text())
    assert vqgan["data"]["no_mirror"] == info["no_mirror"]


def test_samples_are_pictures_on_white_ground(pipe):
    images = pipe.sample([0, "cat-face", "heart", "food-fruit"] * 2, seed=0)
    assert (images.flatten(2).std(2).mean(1) > 0.1).all()  # none of a single colour
    border = torch.cat([images[..., :2, :], images[..., -2:, :]], 2)
    assert (border > 0.97).float().mean() > 0.9  # the ground is white, but for some of its edge
    again = partial(pipe.sample, ["heart"], seed=2)
    assert torch.equal(again(), again())


def test_schemas_cover_the_bundled_configs():
    from maskgit.engine.config import parse_overrides, read_yaml
    from maskgit.runs import resolve

    schemas = {
        "emoji_vqgan": VQGANRun,
        "emoji_maskgit": MaskGITRun,
        "emoji_classifier": ClassifierRun,
        "emoji_clip": CLIPRun,
    }
    for name, schema in schemas.items():
        content = read_yaml(name, [ROOT / "configs"])
        run, expect = resolve(content, parse_overrides([]), smoke=True)
        assert type(run) is schema and run.run.endswith("_smoke") and "loss" in expect
