"""Features of images: equal to torch-fidelity's, never stale, never of a stand-in."""

import os

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import one_line
from pictures import encoded, make_folder, picture
from safetensors.torch import load_file
from torch.utils.data import Dataset
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from maskgit.common import UserError
from maskgit.evaluation.extractors import cached_features, extract, open_extractor
from maskgit.evaluation.metrics import inception_score, kid, precision_recall
from maskgit.evaluation.sets import open_set
from maskgit.evaluation.statistics import frechet

REAL = os.environ.get("MASKGIT_INCEPTION", "")


class Tiny(torch_fidelity.FeatureExtractorBase):
    """A seeded network of one convolution: 8 features and 5 logits."""

    def __init__(self, name, features_list, **options):
        super().__init__(name, features_list)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.convolution = torch.nn.Conv2d(3, 8, 5, stride=3)
            self.head = torch.nn.Linear(8, 5)

    def forward(self, images):
        pooled = self.convolution(images.float() / 255).relu().mean((2, 3))
        found = {"pool": pooled, "logits": self.head(pooled)}
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return "pool", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pool"

    @staticmethod
    def can_be_compiled():
        return False


class Unclassed(Tiny):
    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pool"


class Infinite(Unclassed):
    def forward(self, images):
        (features,) = super().forward(images)
        return (features / (images.amax((1, 2, 3)) > 100)[:, None],)


for kind in (Tiny, Unclassed, Infinite):
    torch_fidelity.register_feature_extractor(f"maskgit-{kind.__name__.lower()}", kind)


class Pictures(Dataset):
    """A set as torch-fidelity takes it."""

    def __init__(self, images):
        self.images = torch.cat(list(images.batches(64)))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture
def images(tmp_path):
    return open_set(str(make_folder(tmp_path / "set", ["cat", "dog"], 5)))


@pytest.fixture
def tiny():
    return open_extractor("maskgit-tiny", "cpu")


def reference(fe, images):
    return get_featuresdict_from_dataset(Pictures(images), fe, 4, False, True, False)


def test_features_are_those_of_torch_fidelity(images, tiny):
    fe = create_feature_extractor("maskgit-tiny", ["pool", "logits"], cuda=False, verbose=False)
    expected = reference(fe, images)
    found = extract(tiny, images, batch_size=4)
    assert torch.equal(found.features, expected["pool"])
    assert torch.equal(found.logits, expected["logits"])
    assert found.features.dtype == found.logits.dtype == torch.float32
    assert (tiny.dim, tiny.logit_dim, found.count) == (8, 5, 10)


def test_statistics_are_those_of_the_features_in_float64(images, tiny):
    for batch_size in (3, 64):
        found = extract(tiny, images, batch_size)
        features = found.features.double().numpy()
        mean, covariance = found.gaussian.mean, found.gaussian.covariance
        assert mean.dtype == covariance.dtype == torch.float64
        np.testing.assert_allclose(mean, features.mean(0), rtol=1e-9)
        np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9)


def test_what_is_not_kept_takes_no_memory(images, tiny):
    kept, lean = extract(tiny, images, 4), extract(tiny, images, 4, keep=False)
    assert (lean.features.shape, lean.logits.shape, lean.count) == ((0, 8), (0, 5), 10)
    assert torch.equal(kept.gaussian.covariance, lean.gaussian.covariance)


def test_an_extractor_without_classes(images):
    extractor = open_extractor("maskgit-unclassed", "cpu")
    assert (extractor.logit_dim, extract(extractor, images).logits) == (None, None)


def test_features_that_are_not_finite(tmp_path):
    images = np.full((6, 32, 32, 3), 200, np.uint8)
    images[4] = 50
    np.savez(tmp_path / "set.npz", images)
    with pytest.raises(UserError) as error:
        extract(open_extractor("maskgit-infinite", "cpu"), open_set(str(tmp_path / "set.npz")), 2)
    one_line(error, "images 4 to 5", "set.npz", "not finite")


def test_precision_is_as_before():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before, seen = (conv.fp32_precision, matmul.fp32_precision), []
    for tf32 in (False, True):
        extractor = open_extractor("maskgit-tiny", "cpu", tf32=tf32)
        network = extractor._network
        extractor._network = lambda x, f=network: (seen.append(conv.fp32_precision), f(x))[1]
        extractor(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
        assert (conv.fp32_precision, matmul.fp32_precision) == before
    assert seen == ["ieee", "tf32"]


@pytest.mark.parametrize("name", ["incepton", "vgg16", "clip-vit-b-32", "inception-v3-compat"])
def test_other_names_are_none(name):
    with pytest.raises(UserError) as error:
        open_extractor(name, "cpu")
    one_line(error, name, "unknown extractor")


# The cache


def test_the_cache_is_keyed_by_content(tmp_path, images, tiny):
    cache = tmp_path / "cache"
    first = cached_features(tiny, images, cache)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    again = cached_features(tiny, open_set(images.name), cache)
    assert torch.equal(again.features, first.features)
    assert torch.equal(again.logits, first.logits)
    assert torch.equal(again.gaussian.mean, first.gaussian.mean)
    assert torch.equal(again.gaussian.covariance, first.gaussian.covariance)
    assert (again.count, file.stat().st_mtime_ns) == (10, written)


def test_data_that_changed_under_its_name_are_no_hit(tmp_path, images, tiny):
    cache = tmp_path / "cache"
    first = cached_features(tiny, images, cache)
    (tmp_path / "set" / "cat" / "002.png").write_bytes(encoded(picture(99)))
    changed = open_set(images.name)
    found = cached_features(tiny, changed, cache)
    assert torch.equal(found.features, extract(tiny, changed).features)
    assert not torch.equal(found.features, first.features)
    smaller = open_set(images.name, (10, 10))
    assert torch.equal(
        cached_features(tiny, smaller, cache).features, extract(tiny, smaller).features
    )
    other = open_extractor("maskgit-unclassed", "cpu")
    assert cached_features(other, changed, cache).logits is None
    assert len(list(cache.iterdir())) == 4


def test_a_damaged_file_is_computed_anew(tmp_path, images, tiny, caplog):
    first = cached_features(tiny, images, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    for damaged in (b"", content[:-40], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(damaged)
        caplog.clear()
        found = cached_features(tiny, images, tmp_path / "cache")
        assert torch.equal(found.features, first.features)
        assert "damaged" in caplog.text
        assert torch.equal(load_file(file)["features"], first.features)


def test_the_default_folder_and_one_that_cannot_be_written(
    tmp_path, images, tiny, caplog, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    first = cached_features(tiny, images)
    assert len(list((tmp_path / "home" / "maskgit" / "features").iterdir())) == 1
    (tmp_path / "file").write_text("no folder")
    found = cached_features(tiny, images, tmp_path / "file" / "cache")
    assert torch.equal(found.features, first.features)
    assert "nothing is kept" in caplog.text


# Whole scores


def test_scores_are_those_of_torch_fidelity_from_pictures_to_numbers(tiny):
    fake, real = open_set("emoji:heldout"), open_set("emoji")
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(fake),
        input2=Pictures(real),
        feature_extractor="maskgit-tiny",
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subsets=5,
        kid_subset_size=100,
        rng_seed=7,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    a, b = extract(tiny, fake), extract(tiny, real)
    x, y = a.gaussian, b.gaussian
    distance = frechet(x.mean, x.covariance, y.mean, y.covariance)
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    precision, recall = precision_recall(b.features, a.features)
    assert precision == pytest.approx(theirs["precision"], rel=1e-4)
    assert recall == pytest.approx(theirs["recall"], rel=1e-4)
    order = torch.from_numpy(np.random.RandomState(7).permutation(len(fake)))
    score = inception_score(a.logits, order=order)
    assert score[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    distance = kid(a.features, b.features, 5, 100, 7)[0]
    assert distance == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-7)


@pytest.mark.skipif(not REAL, reason="MASKGIT_INCEPTION names no file of Inception weights")
def test_the_real_inception_scores_as_torch_fidelity_does(images):
    extractor = open_extractor("inception", "cpu")
    held = open_set("emoji:heldout")
    found, other = extract(extractor, images), extract(extractor, held)
    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(images),
        input2=Pictures(held),
        fid=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        feature_extractor_weights_path=REAL,
    )["frechet_inception_distance"]
    a, b = found.gaussian, other.gaussian
    assert frechet(a.mean, a.covariance, b.mean, b.covariance) == pytest.approx(expected, rel=1e-4)
