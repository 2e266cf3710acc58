"""What one training step of the classifier does: vary the images, name them, compare."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from maskgit.common import UserError
from maskgit.common.folder import write_json
from maskgit.common.vary import VaryConfig, vary
from maskgit.common.watch import Stays, Watch
from maskgit.engine.task import Loss
from maskgit.evaluation.classifier import Classifier

Batch = dict[str, Tensor]  # image uint8 (B, 3, H, W), label and, in training, seed int64 (B,)


@dataclass
class ClassifierLossConfig(VaryConfig):
    """How the classifier is trained."""

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing} is not from 0 to below 1")


class ClassifierTask:
    """Trains a Classifier; device, optimizer and averaged weights are the engine's."""

    def __init__(
        self, model: Classifier, config: ClassifierLossConfig, labels: Sequence[str]
    ) -> None:
        """`labels` are the names of the classes, which are exported beside the weights."""
        self.config, self.labels = config, list(labels)
        self.parts: dict[str, nn.Module] = {"classifier": model}
        self.units = {"images": 1}
        self.best = ("heldout/top1", max)
        chance = math.log(model.config.num_classes)
        self.watch = Watch(
            Stays(
                "loss",
                f"that is ln(classes) = {chance:.3f}, chance: nothing is learnt; lower train.lr",
                low=chance - 0.05,
            )
        )

    def step(
        self, batches: list[Batch], step: int
    ) -> Iterator[tuple[str, list[Callable[[], Loss]]]]:
        """The one update of a step, of the classifier."""
        yield "classifier", [partial(self.loss, batch) for batch in batches]

    def loss(self, batch: Batch) -> Loss:
        """The mean over images, how many they are, and what to log."""
        images = vary(batch["image"].float() / 255, self.config, batch["seed"])
        labels = batch["label"]
        logits = self.parts["classifier"](images)  # (B, num_classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        hits = (logits.argmax(1) == labels).float().mean()
        return loss, float(len(labels)), {"loss": loss, "top1": hits}

    @torch.no_grad()
    def validate(self, model: Classifier, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss (nats, no smoothing), and the shares of images whose class is the likeliest (top1)
        and among the five likeliest (top5)."""
        pairs = [(model(batch["image"].float() / 255), batch["label"]) for batch in batches]
        if not pairs:
            raise UserError("there is no image to validate on")
        logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        own = logits.gather(1, labels[:, None])  # (N, 1)
        rank = (logits > own).sum(1)  # (N,)
        return {
            "loss": F.cross_entropy(logits, labels).item(),
            "top1": (rank < 1).float().mean().item(),
            "top5": (rank < 5).float().mean().item(),
        }

    @torch.no_grad()
    def draw(self, model: Classifier, batch: Batch) -> Tensor:
        """The batch's images, (3, H, W) in [0, 1], those least taken for their class first."""
        images = batch["image"].float() / 255
        own = model(images).log_softmax(1).gather(1, batch["label"][:, None])[:, 0]  # (B,)
        return make_grid(images[own.argsort()[:32]], nrow=8, pad_value=1.0)

    def export(self, model: Classifier, folder: Path) -> None:
        """Write the (averaged) classifier as the `classifier` of a model folder, and the labels."""
        model.save_pretrained(folder / "classifier")
        write_json(folder / "labels.json", self.labels)
