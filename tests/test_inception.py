"""The Inception network: where its weights are looked for, how they are read, what it computes."""

import hashlib
import os
import pickle

import pytest
import torch
from conftest import one_line
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor

from maskgit.common import UserError
from maskgit.evaluation.extractors import open_extractor
from maskgit.evaluation.inception import WEIGHTS, find_inception
from maskgit.evaluation.sets import open_set


def test_missing_weights_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("MASKGIT_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / WEIGHTS
    with pytest.raises(UserError) as error:
        open_extractor("inception", "cpu")
    one_line(error, place, "6726825d", "96 MB", "--extractor-weights", "--extractor emoji")


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("MASKGIT_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    usual = tmp_path / "hub" / "checkpoints" / WEIGHTS
    usual.parent.mkdir(parents=True)
    named, given = tmp_path / "named.pth", tmp_path / "given.pth"
    for file in (usual, named, given):
        file.touch()
    assert find_inception() == usual
    monkeypatch.setenv("MASKGIT_INCEPTION", str(named))
    assert find_inception() == named
    assert find_inception(given) == given
    for file in (given, named):  # what is named and missing is not replaced by another
        file.unlink()
    with pytest.raises(UserError, match=r"given\.pth"):
        find_inception(given)
    with pytest.raises(UserError, match=r"named\.pth"):
        find_inception()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_weights_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    torch.save({"x": Trap()}, tmp_path / "trap.pth")
    foreign, trap = (tmp_path / "foreign.pth").read_bytes(), (tmp_path / "trap.pth").read_bytes()
    for content in (b"", b"text", foreign, foreign[:-99], trap, pickle.dumps(Trap())):
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            open_extractor("inception", "cpu", file)
        one_line(error, file, WEIGHTS, "fetch it again")
    assert not (tmp_path / "sprung").exists()


class Unloaded(FeatureExtractorInceptionV3):
    """Random weights, for tests alone."""

    def load_state_dict(self, state):
        pass


def test_inception_is_that_of_torch_fidelity(tmp_path):
    file = tmp_path / "random.pth"
    torch.save({}, file)
    layers = ["2048", "logits_unbiased"]
    network = Unloaded("random", layers, feature_extractor_weights_path=file)
    torch.save(network.state_dict(), file)
    extractor = open_extractor("inception", "cpu", file)
    assert (extractor.dim, extractor.logit_dim, extractor.size) == (2048, 1008, 299)
    assert extractor.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    fe = create_feature_extractor(
        "inception-v3-compat", layers, False, feature_extractor_weights_path=file, verbose=False
    )
    batch = next(open_set("emoji:heldout").batches(2))
    with torch.no_grad():
        expected = fe(batch)
    for found, one in zip(extractor(batch), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)
