"""What one training step of CLIP does: features of both sides, compared over the whole batch."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute
from torchvision.utils import make_grid

from clip.losses import info_nce, sigmoid_loss
from clip.model import CLIP
from clip.preprocess import normalize, scale_tensor
from clip.texts import Texts, spoken
from clip.zero_shot import class_weights, retrieval
from maskgit.common import UserError, pick
from maskgit.common.folder import write_json
from maskgit.common.processes import world
from maskgit.common.vary import VaryConfig, vary
from maskgit.common.watch import Stays, Watch

Loss = tuple[Tensor, float, dict[str, Any]]
Batch = dict[str, Tensor]
# image uint8 (B, 3, H, W), text int64 (B, L), index int64 (B,) of the image, caption int64 (B,) of
# the text (equal where texts are), captions int64 (B, M) of all texts that the image has, filled up
# with -1, label int64 (B,), -1 for none,
# seed int64 (B,) in training


@dataclass
class CLIPLossConfig(VaryConfig):
    """How a CLIP is trained; which loss it is belongs to the model's recipe."""

    positives: str = "pair"  # pair, caption (all that an image has), or class
    weight: float = 0.5  # of image -> text, against text -> image (ConVIRT)
    smoothing: float = 0.0  # of the targets (ALIGN)
    locked: str | None = None  # image or text: that tower stays as it starts (LiT)
    varied: bool = True  # whether images are turned, zoomed, shifted and coloured

    def __post_init__(self) -> None:
        pick({"pair": 0, "caption": 0, "class": 0}, self.positives, "loss.positives")
        if self.locked is not None:
            pick({"image": 0, "text": 0}, self.locked, "loss.locked")
        if not 0 <= self.weight <= 1 or not 0 <= self.smoothing < 1:
            raise UserError(
                f"loss.weight={self.weight} is a share, loss.smoothing={self.smoothing} one below 1"
            )
        if self.locked == "image" and self.varied:
            raise UserError(
                "loss.locked=image computes the features of each image once: they cannot be varied "
                "(loss.varied=false)"
            )


class CLIPTask:
    """Trains a CLIP; device, optimizer and averaged weights are the engine's."""

    def __init__(
        self,
        model: CLIP,
        config: CLIPLossConfig,
        classes: Sequence[str] = (),
        prompts: Sequence[Texts] | None = None,
    ) -> None:
        """classes: names of the images' classes, if any, which are exported beside the weights.
        prompts: what each is called in texts, if not by its name, for zero-shot while training.
        Raises UserError for a loss that the model cannot have."""
        self.config, self.classes = config, list(classes)
        self.prompts = prompts or [spoken(name) for name in classes]
        sigmoid = model.config.loss == "sigmoid"
        if sigmoid and (config.weight != 0.5 or config.smoothing):
            raise UserError(
                "loss.weight and loss.smoothing are InfoNCE's, not for model.loss=sigmoid"
            )
        if config.positives == "class" and not classes:
            raise UserError("loss.positives=class needs images of classes")
        if config.locked:
            model.tower(config.locked).requires_grad_(False)
        self.model = model
        self.parts: dict[str, nn.Module] = {"clip": model}
        self.units = {"images": 1}
        self.kept: dict[int, Tensor] = {}  # features of the locked tower, by image or caption
        self.best = ("heldout/image_to_text@10", max)
        self.watch = Watch(
            Stays(
                "loss_above_chance",
                "that is ln(pairs), chance: nothing is told apart; check that captions belong to "
                "their images, and lower train.lr",
                low=-0.05,
                steps=500,
            )
        )

    def step(
        self, batches: list[Batch], step: int
    ) -> Iterator[tuple[str, list[Callable[[], Loss]]]]:
        """The one update of a step, on all pairs at once however many micro-batches they come in;
        and after it the scale brought back into its bounds."""
        model = self.model
        if len(batches) > 1 and any(isinstance(m, _BatchNorm) for m in model.modules()):
            raise UserError(
                "train.micro_batch would change what BatchNorm computes: take a tower without it, "
                "or train.micro_batch=null"
            )
        yield "clip", [partial(self.contrast, batches)]
        if model.config.max_scale is not None:
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(model.config.max_scale))

    def contrast(self, batches: list[Batch]) -> Loss:
        """The loss of this process's pairs, its weight, and what to log."""
        model = self.model
        sides = [self.features(model, batch, again=len(batches) > 1) for batch in batches]
        image, text = (torch.cat(side) for side in zip(*sides, strict=True))
        batch = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        loss = self.loss(model, image, text, batch)
        logs = {"loss": loss, "scale": model.logit_scale.detach().exp()}
        if model.logit_bias is not None:
            logs["bias"] = model.logit_bias.detach()
        else:  # below ln(pairs), which it is where nothing is told apart
            logs["loss_above_chance"] = loss - math.log(world() * len(image))
        hits = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
        logs["top1"] = hits.float().mean()  # of this process's images, their own text first
        return loss, 1.0, logs

    def features(self, model: CLIP, batch: Batch, again: bool = False) -> tuple[Tensor, Tensor]:
        """Of images and texts, (B, E) each. With `again` nothing but the features is kept, and the
        towers run again, with the same random numbers, when gradients are asked for (GradCache,
        Gao et al. 2021; here as checkpoints around each micro-batch)."""
        sides = {
            "image": (batch["image"], batch["index"]),
            "text": (batch["text"], batch["caption"]),
        }
        found = {}
        for side, (inputs, ids) in sides.items():
            encode = partial(self.encode, model, side)
            if side == self.config.locked and model.training:
                found[side] = self.locked_features(encode, inputs, ids)
            elif again:
                found[side] = recompute(encode, inputs, batch.get("seed"), use_reentrant=False)
            else:
                found[side] = encode(inputs, batch.get("seed"))
        return found["image"], found["text"]

    def encode(self, model: CLIP, side: str, inputs: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Unit-length features (B, E) of images (B, 3, H, W) uint8 or of texts (B, L); images are
        varied by `seeds` (B,), where training gives them."""
        if side == "text":
            return model(None, inputs)[1]
        images = inputs.float() / 255
        if self.config.varied and seeds is not None:
            images = vary(images, self.config, seeds)
        return model(normalize(scale_tensor(images, model.config), model.config), None)[0]

    @torch.no_grad()
    def locked_features(
        self, encode: Callable[[Tensor], Tensor], inputs: Tensor, ids: Tensor
    ) -> Tensor:
        """Of the tower that is locked: (B, ...), ids (B,) -> (B, E), computed once for each id, and
        alone, since in a batch they would be rounded otherwise after a resume."""
        self.model.tower(str(self.config.locked)).eval()  # no dropout in what is computed once
        for i, key in enumerate(ids.tolist()):
            if key not in self.kept:
                self.kept[key] = encode(inputs[i : i + 1])[0].cpu()
        return torch.stack([self.kept[key] for key in ids.tolist()]).to(inputs.device)

    def loss(self, model: CLIP, image: Tensor, text: Tensor, batch: Batch) -> Tensor:
        """The recipe's loss of a batch of features, in fp32 whatever the towers ran in."""
        config, label, scale = self.config, batch["label"], model.logit_scale.exp()
        keys = {
            "pair": None,
            "caption": (batch["captions"], batch["caption"]),
            "class": (label[:, None], label),
        }[config.positives]
        with torch.autocast(image.device.type, enabled=False):
            if model.logit_bias is not None:
                return sigmoid_loss(image, text, scale, model.logit_bias, keys)
            return info_nce(image, text, scale, keys, config.weight, config.smoothing)

    @torch.no_grad()
    def validate(self, model: CLIP, batches: Iterable[Batch]) -> dict[str, float]:
        """Over the whole set, each image with one text of its own: loss (nats, pairs of a batch
        alone), recall@10 of texts for an image and of images for a text and, where there are
        classes, zero-shot top-1."""
        images, texts, labels, losses = [], [], [], []
        for batch in batches:
            image, text = self.features(model, batch)
            images.append(image)
            texts.append(text)
            labels.append(batch["label"])
            if len(image) > 1:
                losses.append(self.loss(model, image, text, batch))
        if not images:
            raise UserError("there is no image to validate on")
        image, text = torch.cat(images), torch.cat(texts)
        scores = {"loss": float(torch.stack(losses).mean())} if losses else {}
        scores |= retrieval(image, text, torch.arange(len(image)), at=(10,))
        if self.classes:
            weights = class_weights(model, self.prompts)
            scores["zero_shot_top1"] = float(
                ((image @ weights.T).argmax(1) == torch.cat(labels)).float().mean()
            )
        return scores

    @torch.no_grad()
    def draw(self, model: CLIP, batch: Batch) -> Tensor:
        """One row for each of the batch's first texts: its image, and the 7 that fit it best."""
        image, text = self.features(model, batch)
        best = (text[:8] @ image.T).topk(min(7, len(image))).indices  # (8, 7)
        own = torch.arange(len(best), device=best.device)[:, None]
        rows = torch.cat([own, best], 1)
        return make_grid(batch["image"][rows.flatten()].float() / 255, rows.shape[1], pad_value=1.0)

    def export(self, model: CLIP, folder: Path) -> None:
        """Write the (averaged) model as the `clip` of a model folder, and the classes if any."""
        model.save_pretrained(folder / "clip")
        if self.classes:
            write_json(folder / "labels.json", self.classes)
