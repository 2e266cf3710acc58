"""The Inception network of 2015, as torch-fidelity ports it, and where its weights are."""

import hashlib
import io
import os
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from maskgit.common import UserError

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # ends in the first digits of its hash
NAME = "inception-v3-compat"  # in torch-fidelity


def open_inception(weights: str | Path | None) -> tuple[FeatureExtractorInceptionV3, str]:
    """The network, with its features and its logits, and the SHA-256 of its weights.

    Raises UserError when the weights are not there, or are none.
    """
    path = find_inception(weights)
    try:
        content = path.read_bytes()
        # torch-fidelity unpickles whatever it is given: it is given what was read safely.
        safe = io.BytesIO()
        torch.save(torch.load(io.BytesIO(content), weights_only=True), safe)
        safe.seek(0)
        network = FeatureExtractorInceptionV3(
            NAME, ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        )
    except Exception:  # on foreign bytes, unpickling raises nearly anything
        raise UserError(
            f"{path} is not torch-fidelity's {WEIGHTS}, or damaged: fetch it again"
        ) from None
    return network, hashlib.sha256(content).hexdigest()


def find_inception(weights: str | Path | None = None) -> Path:
    """The file `weights`, else what the environment variable MASKGIT_INCEPTION names, else the one
    in torch.hub's folder of checkpoints. Raises UserError when it is not there."""
    usual = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    path = Path(weights or os.environ.get("MASKGIT_INCEPTION") or usual).expanduser()
    if path.is_file():
        return path
    raise UserError(
        f"no Inception weights at {path}: put {WEIGHTS} (of torch-fidelity's release v0.2.0; about "
        f"96 MB, SHA-256 6726825d...) at {usual}, or name it with --extractor-weights or "
        "MASKGIT_INCEPTION; --extractor emoji works without it"
    )
