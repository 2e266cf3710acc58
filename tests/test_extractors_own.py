"""Networks of one's own as extractors: a classifier that was trained here, and CLIPs."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import one_line
from pictures import make_folder
from tiny_clip import save_clip

from clip import CLIP
from maskgit.common import UserError
from maskgit.common.folder import file_hash
from maskgit.evaluation.classifier import Classifier, ClassifierConfig
from maskgit.evaluation.extractors import cached_features, extract, open_extractor
from maskgit.evaluation.score import Scorer, describe_extractor, score
from maskgit.evaluation.sets import open_set


@pytest.fixture
def images(tmp_path):
    return open_set(str(make_folder(tmp_path / "set", ["cat", "dog"], 5)))


# The bundled classifier's kind


def test_a_classifier_of_ones_own_gives_features_and_logits_of_one_pass(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig(num_classes=3, size=32, widths=[8, 16])).eval()
    classifier.save_pretrained(tmp_path / "export" / "classifier", half=True)
    (tmp_path / "export" / "labels.json").write_text('["a", "b", "c"]')
    extractor = open_extractor(str(tmp_path / "export"), "cpu")
    own = Classifier.from_pretrained(tmp_path / "export" / "classifier")
    batch = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    features, logits = extractor(batch)
    with torch.no_grad():
        torch.testing.assert_close(features, own.features(batch / 255))
        torch.testing.assert_close(logits, own(batch / 255))
    assert (extractor.name, extractor.dim, extractor.logit_dim) == ("classifier", 16, 3)
    assert (extractor.size, extractor.classes) == (32, ["a", "b", "c"])
    weights = tmp_path / "export" / "classifier" / "model.safetensors"
    assert extractor.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(UserError) as error:
        open_extractor("nowhere", "cpu")
    one_line(error, "unknown extractor 'nowhere'", "emoji")


# CLIPs


def test_features_of_a_clip_are_as_projected(tmp_path, images):
    folder = save_clip(tmp_path / "model")
    extractor = open_extractor(f"clip:{folder}", "cpu")
    model = CLIP.from_pretrained(folder)
    batch = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    features, logits = extractor(batch)
    with torch.no_grad():
        expected = model.encode_image(model.preprocess(batch / 255), normalize=False)
    torch.testing.assert_close(features, expected)
    assert (features.norm(dim=1) - 1).abs().min() > 1e-3 and logits is None
    assert (extractor.name, extractor.dim, extractor.logit_dim, extractor.size) == (
        "clip",
        24,
        None,
        16,
    )
    assert extractor.sha256 == file_hash(folder / "model.safetensors")
    assert describe_extractor(extractor)["recipe"]["image"]["patch"] == 8
    with pytest.raises(UserError) as error:
        open_extractor("clip:nowhere", "cpu")
    one_line(error, "nowhere")


def test_another_recipe_of_the_same_weights_is_no_hit(tmp_path, images):
    folder, cache = save_clip(tmp_path / "model"), tmp_path / "cache"
    first = cached_features(open_extractor(f"clip:{folder}", "cpu"), images, cache)
    config = json.loads((folder / "config.json").read_text())
    config |= {"mean": [0.5] * 3, "recipe": "ViT-B-32/openai"}
    (folder / "config.json").write_text(json.dumps(config))
    other = open_extractor(f"clip:{folder}", "cpu")
    found = cached_features(other, images, cache)
    assert other.name == "clip"  # no name of published weights without their hash
    assert not torch.allclose(found.features, first.features)
    assert len(list(cache.iterdir())) == 2


def test_cmmd_and_the_frechet_distance_of_a_clip(tmp_path):
    extractor = open_extractor(f"clip:{save_clip(tmp_path / 'model')}", "cpu")
    heldout = open_set("emoji:heldout")
    first = tmp_path / "first.npz"
    np.savez(first, torch.cat(list(heldout.batches(64)))[:110].permute(0, 2, 3, 1).numpy())
    scorer = Scorer(extractor, heldout, tmp_path / "cache")
    names, left = scorer.choose(None, 110, [])
    assert "cmmd" in names and "is" in left
    fake = open_set(str(first))
    found = score(["cmmd", "fid"], scorer, fake, fake.labels)
    assert list(found) == ["CMMD-clip", "FD-clip"]
    x, y = (
        torch.nn.functional.normalize(extract(extractor, s).features.double(), dim=1)
        for s in (fake, heldout)
    )
    xx, yy, xy = (
        torch.exp(-(torch.cdist(a, b) ** 2) / 200).mean() for a, b in ((x, x), (y, y), (x, y))
    )
    expected = (1000 * (xx + yy - 2 * xy)).item()
    assert expected > 0 and found["CMMD-clip"]["value"] == pytest.approx(expected, rel=1e-6)
    assert scorer.choose(["cmmd"], 110, [])[0] == ["cmmd"]
    for name, count, why in (("clip", 99, "needs 100"), ("emoji", 110, "no CLIP")):
        network = extractor if name == "clip" else open_extractor(name, "cpu")
        with pytest.raises(UserError) as error:
            Scorer(network, heldout, tmp_path / "cache").choose(["cmmd"], count, [])
        one_line(error, "--metrics cmmd", why)
