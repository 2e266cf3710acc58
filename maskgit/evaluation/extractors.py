"""Networks that turn images into features, what they make of a set, and the cache that keeps it."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from maskgit.common import UserError, pick
from maskgit.common.device import pick_device
from maskgit.common.folder import ASSETS, file_hash, read_json
from maskgit.common.progress import meter
from maskgit.evaluation import cache
from maskgit.evaluation.classifier import Classifier
from maskgit.evaluation.inception import open_inception
from maskgit.evaluation.protocol import clip_name
from maskgit.evaluation.sets import PixelSet
from maskgit.evaluation.statistics import Gaussian

Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]
FilePath = str | Path


class Extractor:
    """Images uint8 (B, 3, H, W) -> features (B, D) and, where it has classes, logits (B, K).

    Both are float32, on the extractor's device. `dim` is D, `logit_dim` K or None, `size` the side
    in pixels that the network brings images to (None: it takes them as they are), `classes` the
    names of the K classes ([]: not known), `sha256` the hash of the weights, `recipe` what else the
    features depend on, where the weights alone do not say it.
    """

    def __init__(
        self,
        name: str,
        sha256: str,
        network: Network,
        device: torch.device,
        size: int | None = None,
        classes: list[str] | None = None,
        tf32: bool = False,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.recipe = recipe
        self.name, self.sha256, self.device = name, sha256, device
        self.size, self.classes, self.tf32 = size, classes or [], tf32
        self._network = network
        features, logits = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        self.dim = features.shape[1]
        self.logit_dim = None if logits is None else logits.shape[1]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with precision("tf32" if self.tf32 else "ieee"):
            features, logits = self._network(images.to(self.device, non_blocking=True))
        return features.float(), None if logits is None else logits.float()


@contextmanager
def precision(name: str) -> Iterator[None]:
    """How GPUs multiply float32 in the meantime: "ieee", or the rougher "tf32"."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = conv.fp32_precision = name
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def open_extractor(
    name: str, device: str | torch.device, weights: FilePath | None = None, tf32: bool = False
) -> Extractor:
    """The extractor "inception" or "emoji", a folder with a classifier of one's own (then called
    "classifier"), "clip" (the bundled CLIP) or "clip:SOURCE" (any other), or one that was
    registered in torch-fidelity.

    weights: the file of the Inception weights, where they are not in their usual place. Nothing is
    downloaded and nothing stands in for another: raises UserError when the weights are missing.
    """
    device = pick_device(device)
    if name == "inception":
        fe, sha256 = open_inception(weights)
        return wrap_torch_fidelity(fe.to(device), name, sha256, device, tf32)
    if name == "emoji":
        return _open_classifier(name, ASSETS / "emoji", device, tf32)
    kind, _, source = name.partition(":")
    if kind == "clip":
        return _open_clip(source or "emoji", device, tf32)
    if Path(name).expanduser().is_dir():
        return _open_classifier("classifier", Path(name).expanduser(), device, tf32)
    own = {  # without those that torch-fidelity brings, and downloads the weights of
        key: cls
        for key, cls in FEATURE_EXTRACTORS_REGISTRY.items()
        if not cls.__module__.startswith("torch_fidelity.")
    }
    cls = pick({"inception": None, "emoji": None, "clip": None, **own}, name, "extractor")
    fe = cls(name, _layers(cls), feature_extractor_weights_path=weights)
    return wrap_torch_fidelity(fe.to(device), name, _state_hash(fe), device, tf32)


def wrap_torch_fidelity(
    fe: FeatureExtractorBase, name: str, sha256: str, device: torch.device, tf32: bool = False
) -> Extractor:
    """An extractor of torch-fidelity's that gives the features of its FID and, if it has them, of
    its Inception Score."""
    feature_layer, *logit_layer = _layers(type(fe))
    fe.requires_grad_(False).eval()

    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = fe.convert_features_tuple_to_dict(fe(images))
        return found[feature_layer], found[logit_layer[0]] if logit_layer else None

    size = getattr(fe, "INPUT_IMAGE_SIZE", None)
    return Extractor(name, sha256, network, device, size, tf32=tf32)


def _layers(cls: type[FeatureExtractorBase]) -> list[str]:
    """The layers that `cls` uses for FID and for the Inception Score, the latter if another."""
    layers = [cls.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    return list(dict.fromkeys(layers))


def _state_hash(module: torch.nn.Module) -> str:
    """SHA-256 of a module's class and tensors, for one that comes from no file."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _open_classifier(name: str, folder: Path, device: torch.device, tf32: bool) -> Extractor:
    """`folder` is a run's export: `classifier/`, and the names of its classes beside it."""
    folder = folder / "classifier"
    classifier = Classifier.from_pretrained(folder).to(device)

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        features = classifier.features(images.float() / 255)
        return features, classifier.head(features)

    sha256 = file_hash(folder / "model.safetensors")
    classes = read_json(folder.parent / "labels.json")
    return Extractor(name, sha256, network, device, classifier.config.size, classes, tf32)


def _open_clip(source: str, device: torch.device, tf32: bool) -> Extractor:
    """Image features as projected, not of unit length (as clean-fid's CLIP-FID has them)."""
    from maskgit.evaluation.clip_model import open_clip_model

    clip = open_clip_model(source, device)
    model, recipe = clip.model, clip.model.config

    def network(images: Tensor) -> tuple[Tensor, None]:
        pixels = model.preprocess(images.float() / 255)  # (B, 3, h, w)
        return model.encode_image(pixels, normalize=False), None

    name = clip_name(clip.published)
    h, w = recipe.image.size
    size = h if h == w else None
    return Extractor(name, clip.sha256, network, device, size, tf32=tf32, recipe=asdict(recipe))


@dataclass
class Features:
    """What an extractor makes of a set of images, in its order."""

    gaussian: Gaussian
    features: Tensor  # (N, D) float32 on the CPU; (0, D) where they were not kept
    logits: Tensor | None  # (N, K) or (0, K), likewise

    @property
    def count(self) -> int:
        return self.gaussian.count


def extract(
    extractor: Extractor, images: PixelSet, batch_size: int = 64, keep: bool = True
) -> Features:
    """One pass over `images`, with the next batches read and the last one's statistics computed
    while the network runs. Without `keep`, memory does not grow with the number of images.

    Raises UserError for an unusable image and for features that are not finite.
    """
    rows = len(images) if keep else 0
    features = torch.empty(rows, extractor.dim)
    logits = None if extractor.logit_dim is None else torch.empty(rows, extractor.logit_dim)
    gaussian, done = Gaussian(extractor.dim), 0

    def take(start: int, found: Tensor, scores: Tensor | None) -> None:
        found = found.cpu()
        if not (found.isfinite().all() and (scores is None or scores.isfinite().all())):
            raise UserError(
                f"features of images {start} to {start + len(found) - 1} of {images.name} are not "
                f"finite: look at these images, and at the weights of {extractor.name}"
            )
        gaussian.update(found)
        if keep:
            features[start : start + len(found)] = found
            if logits is not None and scores is not None:
                logits[start : start + len(found)] = scores.cpu()

    with ThreadPoolExecutor(1) as pool, meter(len(images), "features", "images") as advance:
        last: Future[None] = pool.submit(lambda: None)
        for batch in images.batches(batch_size):
            found = extractor(batch)
            last.result()
            last = pool.submit(partial(take, done, *found))
            done += len(batch)
            advance(len(batch), images.name)
        last.result()
    return Features(gaussian, features, logits)


def cached_features(
    extractor: Extractor, images: PixelSet, folder: Path | None = None, batch_size: int = 64
) -> Features:
    """What `extract` gives, kept in `folder` under a hash of the images and the extractor.

    A name plays no part: data that changed under its name are computed anew, as is what a damaged
    file held. folder: `maskgit/features` in the user's cache, if None.
    """
    path = (folder or cache.default_folder()) / f"{_key(extractor, images)}.safetensors"
    kept = cache.load(path)
    if kept is not None:
        gaussian = Gaussian(extractor.dim)
        gaussian.count = len(kept["features"])
        gaussian.mean, gaussian.scatter = kept["mean"], kept["scatter"]
        return Features(gaussian, kept["features"], kept.get("logits"))
    found = extract(extractor, images, batch_size)
    tensors = {"features": found.features}
    tensors |= {"mean": found.gaussian.mean, "scatter": found.gaussian.scatter}
    if found.logits is not None:
        tensors["logits"] = found.logits
    cache.save(path, tensors)
    return found


def _key(extractor: Extractor, images: PixelSet) -> str:
    parts = (
        extractor.name,
        extractor.sha256,
        extractor.size,
        extractor.tf32,
        images.hash,
        images.size,
        extractor.recipe,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
