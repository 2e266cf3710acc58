"""What one training step of the transformer does: mask, predict, compare."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from maskgit.common import UserError, noise, pick
from maskgit.common.folder import read_json, write_json
from maskgit.common.watch import Stays, Watch
from maskgit.engine.task import Logs, Loss
from maskgit.masking import random_mask
from maskgit.model import MaskGIT
from maskgit.pipeline import Pipeline
from maskgit.schedule import SCHEDULES
from vqgan import VQGAN

BINS = ("0-25", "25-50", "50-75", "75-100")  # per cent of an image's tokens that are masked
Batch = dict[str, Tensor]  # tokens int64 (B, N), label and, in training, seed int64 (B,)


@dataclass
class MaskGITLossConfig:
    """How the transformer is trained."""

    schedule: str = "cosine"  # of the mask ratio
    unmasked_weight: float = 0.0  # of known tokens in the loss: 0 masked ones only, 1 all alike
    label_smoothing: float = 0.1
    label_dropout: float = 0.1  # share of images whose class is hidden, so that guidance works


def masked_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    unmasked_weight: float = 0.0,
    label_smoothing: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, weighted 1 where masked and `unmasked_weight` elsewhere.

    logits (B, N, K), targets int64 (B, N), mask bool (B, N) -> the weighted sum in nats and the sum
    of weights, both scalar. Their ratio is the loss of the batch; over several batches, divide the
    sum of the sums by the sum of the weights.
    """
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    weight = torch.full_like(loss, unmasked_weight).masked_fill(mask.flatten(), 1.0)
    return (loss * weight).sum(), weight.sum()


def accuracy_by_ratio(hit: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Masked tokens predicted right, and masked tokens, of images grouped by how much of them is
    masked. hit, mask: bool (B, N)."""
    group = (mask.float().mean(1) * len(BINS)).ceil().long().clamp(min=1) - 1  # (B,)
    hits, masked = (
        torch.zeros(len(BINS), device=mask.device).index_add_(0, group, count.sum(1).float())
        for count in (hit & mask, mask)
    )
    return {f"accuracy_{name}": (hits[i], masked[i]) for i, name in enumerate(BINS)}


class MaskGITTask:
    """Trains a MaskGIT on tokens; device, optimizer and averaged weights are the engine's.

    Batches are dicts of `tokens`, int64 (B, N), `label`, int64 (B,), and `seed`, int64 (B,): what
    is random about an image (its mask, whether its class is hidden) is a function of that.
    """

    def __init__(
        self,
        model: MaskGIT,
        config: MaskGITLossConfig,
        tokenizer: VQGAN,
        labels: Sequence[str] = (),
        sampling: dict[str, Any] | None = None,
        commonest: float = 0.0,
    ) -> None:
        """`tokenizer`, class names and sampler settings go into what is drawn and exported.

        commonest: the share of the commonest code, which a model finds that has learnt no more.
        Raises UserError for a setting out of range, or one that the model was not made for.
        """
        pick(SCHEDULES, config.schedule, "schedule")
        for name in ("unmasked_weight", "label_smoothing", "label_dropout"):
            if not 0 <= getattr(config, name) <= 1:
                raise UserError(f"{name}={getattr(config, name)} is not between 0 and 1")
        if config.label_dropout and model.config.num_classes and model.config.null_label is None:
            raise UserError("label_dropout needs a model with a null label: set label_dropout=0")
        self.config, self.model_config = config, model.config
        self.pipeline = partial(Pipeline, tokenizer, labels=labels, sampling=sampling)
        self.pipeline(transformer=model)  # raises now, not when the first sheet is drawn
        self.parts: dict[str, nn.Module] = {"transformer": model}
        self.units = {"images": 1, "tokens": model.config.tokens}
        self.best = ("heldout/loss", min)
        chance = math.log(model.config.codebook_size)
        self.watch = Watch(
            Stays(
                "loss",
                f"that is ln(codes) = {chance:.3f}, chance: nothing is learnt; lower train.lr, "
                "lengthen train.warmup, or look at the tokens (maskgit evaluate tokenizer)",
                low=chance - 0.05,
            ),
            Stays(
                "accuracy",
                "that is hardly more than the commonest code would be right: train longer, raise "
                "train.lr, or look at the tokenizer: do its reconstructions keep what images show?",
                high=1.5 * max(commonest, 1 / model.config.codebook_size),
                steps=2000,
            ),
        )

    def step(
        self, batches: list[Batch], step: int
    ) -> Iterator[tuple[str, list[Callable[[], Loss]]]]:
        """The one update of a step, of the transformer."""
        yield "transformer", [partial(self.loss, batch) for batch in batches]

    def loss(self, batch: Batch) -> Loss:
        """The mean over masked tokens, how many they are (by weight), and what to log."""
        config, tokens = self.config, batch["tokens"]
        mask, _ = random_mask(batch["seed"], tokens.shape[1], config.schedule)
        masked = tokens.masked_fill(mask, self.model_config.mask_id)
        logits = self.parts["transformer"](masked, self.drop_labels(batch))  # (B, N, K)
        total, weight = masked_loss(
            logits, tokens, mask, config.unmasked_weight, config.label_smoothing
        )
        loss = total / weight
        with torch.no_grad():
            hit = logits.argmax(-1) == tokens
            logs: Logs = {
                "loss": loss,
                "accuracy": ((hit & mask).sum(), mask.sum()),
                **accuracy_by_ratio(hit, mask),
            }
        return loss, weight, logs

    def drop_labels(self, batch: Batch) -> Tensor:
        """The labels int64 (B,), hidden for a random share of images."""
        null_label = self.model_config.null_label
        if null_label is None:
            return batch["label"]
        draw = noise.uniform(batch["seed"], 0, 1, noise.LABEL)[:, 0]  # (B,)
        return batch["label"].masked_fill(draw < self.config.label_dropout, null_label)

    @torch.no_grad()
    def validate(self, model: MaskGIT, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss (nats a masked token, no smoothing) and masked accuracy of `model`, in eval mode.

        The masks are the same at each call, so that numbers can be compared over time and models:
        images take turns at 1/8, 3/8, 5/8 and 7/8 masked, in places that their turn alone decides.
        """
        losses, hits, masked, images = 0.0, 0.0, 0.0, 0
        for batch in batches:
            tokens = batch["tokens"]
            b, n = tokens.shape
            turn = torch.arange(images, images + b, device=tokens.device)
            count = ((turn % len(BINS) + 0.5) / len(BINS) * n).round().clamp(min=1)  # (B,)
            rank = noise.uniform(turn, 0, n, noise.TOKEN).argsort(-1).argsort(-1)
            mask = rank < count[:, None]
            logits = model(tokens.masked_fill(mask, model.config.mask_id), batch["label"])
            loss, weight = masked_loss(logits, tokens, mask, label_smoothing=0.0)
            losses += loss.item()
            masked += weight.item()
            hits += ((logits.argmax(-1) == tokens) & mask).sum().item()
            images += b
        if not images:
            raise UserError("there is no image to validate on")
        return {"loss": losses / masked, "accuracy": hits / masked}

    def draw(self, model: MaskGIT, batch: Batch) -> Tensor:
        """A sheet (3, H, W) in [0, 1] of 32 samples of `model`: classes spread over all there are,
        the same seeds each time, so that sheets can be compared over time."""
        classes = model.config.num_classes
        labels = [i * classes // 32 for i in range(32)] if classes else None
        samples = self.pipeline(transformer=model).sample(labels or [None] * 32)
        return make_grid(samples, nrow=8, pad_value=1.0)

    def export(self, model: MaskGIT, folder: Path) -> None:
        """Write a whole model folder: the (averaged) transformer, its tokenizer, the labels."""
        self.pipeline(transformer=model).save_pretrained(folder)
        index = folder / "model_index.json"
        write_json(index, {**read_json(index), "averaged_weights": True})
