"""What one training step of the tokenizer does: parts {generator, discriminator, codebook}."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskgit.common import UserError, pick
from maskgit.common.processes import world
from maskgit.common.watch import Falls, Stays, Watch
from vqgan import losses
from vqgan.codebook import CodebookAverage, entropy_loss, kmeans, mean_distribution, usage
from vqgan.discriminator import Discriminator, DiscriminatorConfig
from vqgan.model import VQGAN

Batch = dict[str, Tensor]
Loss = tuple[Tensor, float, dict[str, Any]]  # a mean over images, how many, what to log


@dataclass
class VQGANLossConfig:
    """Weights and switches of the tokenizer's losses; a weight of 0 leaves the loss out."""

    reconstruction: str = "l1"  # or "l2"
    gradient: float = 0.0  # multi-scale gradient loss
    perceptual: float = 0.0  # LPIPS, on the VGG weights in the file `vgg`
    vgg: str = "~/.cache/torch/hub/checkpoints/vgg16-397923af.pth"
    commitment: float = 0.25  # beta
    swapped: bool = False  # beta on the codebook's term, as taming's published models
    entropy: float = 0.0
    entropy_temperature: float = 0.01
    average: bool = True  # codes follow their latents by moving average, not by gradient
    decay: float = 0.99  # of that average
    dead: float = 0.1  # a code with fewer latents a step, on average, is restarted
    quantize_from: int = 100  # steps of plain autoencoding before k-means makes the codebook
    restart_until: int = 1_000_000_000  # no restarts later, so that the codes can settle
    decoder_only: bool = False  # encoder and codebook stand still: every token stays what it was
    adversarial: float = 0.0  # the generator's weight once the discriminator takes part
    adversarial_loss: str = "hinge"  # or "non-saturating"
    adaptive: bool = True  # weigh it further by the ratio of gradients, at most `adaptive_max`
    adaptive_max: float = 1.0
    feature_matching: float = 0.0
    r1: float = 0.0  # weight of the discriminator's steepness at real images ...
    r1_every: int = 16  # ... which is computed at every so many steps
    discriminator_from: int = 0  # the discriminator trains alone from here on ...
    generator_from: int = 1000  # ... to here, where the generator begins to feel it ...
    ramp: int = 1000  # ... fully after so many steps


@dataclass
class Whole:
    """What of a batch in micro-batches is known before the first of them has its gradient."""

    pull: Tensor | None = None  # the adaptive weight
    mean: Tensor | None = None  # (K,): of the distribution over codes


class VQGANTask:
    """Trains a VQGAN on images; batches are dicts of `image`, uint8 (B, 3, H, W).

    The discriminator cannot ambush the generator: it first trains alone, then its weight ramps up.
    """

    def __init__(
        self,
        model: VQGAN,
        config: VQGANLossConfig,
        discriminator: DiscriminatorConfig,
        image_size: int,
    ) -> None:
        """Raises UserError for settings that cannot work, missing VGG weights among them."""
        self.config, self.model = config, model
        self.reconstruction = pick(losses.RECONSTRUCTION, config.reconstruction, "reconstruction")
        self.of_discriminator, self.of_generator = pick(
            losses.ADVERSARIAL, config.adversarial_loss, "adversarial loss"
        )
        if config.adversarial and config.generator_from < config.discriminator_from:
            raise UserError("generator_from must not come before discriminator_from")
        if config.r1 and (config.r1_every < 1 or not config.adversarial):
            raise UserError("loss.r1 needs loss.adversarial, and loss.r1_every of 1 or more")
        self.perceptual = losses.perceptual(config.vgg) if config.perceptual else None
        self.parts: dict[str, nn.Module] = {"generator": model}
        self.units = {"images": 1}
        self.best = ("heldout/psnr", max)
        self.watch = Watch(
            Falls(
                "heldout/usage",
                "codes fall out of use; raise loss.dead or loss.entropy, or lower train.lr",
                since=config.quantize_from,
            ),
            Stays(
                "discriminator_accuracy",
                "the discriminator wins, and its gradient says nothing; lower loss.adversarial or "
                "discriminator.channels, raise loss.r1, or let it begin later "
                "(loss.discriminator_from)",
                low=0.98,
                since=config.generator_from + config.ramp,  # before, nothing holds it up
            ),
        )
        if config.adversarial:
            self.parts["discriminator"] = Discriminator(discriminator, image_size)
        codebook = model.quantizer.codebook
        codebook.requires_grad_(not config.average)
        if config.decoder_only:  # a sharper decoder for the same tokens (Muse, section 2.3)
            for still in (model.encoder, model.quant_conv, model.quantizer):
                still.requires_grad_(False)
        pool = 16 * len(codebook) if config.quantize_from else 0
        self.codebook = CodebookAverage(codebook, config.decay, config.dead, pool)
        self.parts["codebook"] = self.codebook

    def step(
        self, batches: list[Batch], step: int
    ) -> Iterator[tuple[str, list[Callable[[], Loss]]]]:
        """The generator's update, then the discriminator's where it takes part."""
        config = self.config
        quantized = step >= config.quantize_from
        if config.quantize_from and step == config.quantize_from:
            pixels = world() * sum(batch["image"][:, 0].numel() for batch in batches)
            self.start_codebook(pixels // self.model.config.factor**2)
        whole = self.survey(batches, step) if len(batches) > 1 else Whole()
        seen: list[tuple[Tensor, ...]] = []  # of each micro-batch: images, copies, latents, tokens
        yield "generator", [partial(self.generate, batch, step, whole, seen) for batch in batches]

        rows = torch.cat([rows for _, _, rows, _ in seen])
        if not quantized:
            self.codebook.collect(rows)
        elif not config.decoder_only:
            self.follow(rows, torch.cat([tokens for *_, tokens in seen]), step)
        if config.adversarial and step >= config.discriminator_from:
            pairs = [(real, fake) for real, fake, *_ in seen]
            yield "discriminator", [partial(self.discriminate, *pair, step) for pair in pairs]

    def generate(
        self, batch: Batch, step: int, whole: "Whole", seen: list[tuple[Tensor, ...]]
    ) -> Loss:
        """The generator's loss, a mean over images; `seen` gets what its other updates need."""
        config = self.config
        real, (fake, rows, tokens, quantizer) = self.forward(batch, step)
        seen.append((real, fake.detach(), rows.detach(), tokens.flatten()))
        loss, logs = self.pictures_loss(real, fake)
        if ramp := self.ramp(step):
            adversarial, more = self.adversarial_loss(real, fake)
            pull = torch.ones_like(loss) if whole.pull is None else whole.pull
            if config.adaptive and whole.pull is None:
                pull = self.adaptive(self.gradients(loss, adversarial))
            weight = config.adversarial * ramp * pull
            logs |= more | {"adversarial_weight": weight}
            loss = loss + weight * adversarial
        if config.entropy and step >= config.quantize_from:
            codes = self.model.quantizer.codes()
            entropy = entropy_loss(rows, codes, config.entropy_temperature, whole.mean)
            loss, logs = loss + config.entropy * entropy, logs | {"entropy": entropy}
        loss = loss + quantizer
        return loss, float(len(real)), logs | {"loss": loss, "quantizer": quantizer}

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The images (B, 3, H, W) in [0, 1], and what the model makes of them."""
        config = self.config
        real = batch["image"].to(self.model.decoder.conv_out.weight.dtype) / 255
        return real, self.model(
            real, config.commitment, config.swapped, step >= config.quantize_from
        )

    def survey(self, batches: list[Batch], step: int) -> "Whole":
        """What the loss of one micro-batch has to know of all: the adaptive weight and the mean of
        the code distribution are no means over micro-batches. Another forward pass of each."""
        config, whole = self.config, Whole()
        adaptive = config.adaptive and self.ramp(step) > 0
        entropy = config.entropy > 0 and step >= config.quantize_from
        for batch in batches if adaptive or entropy else []:
            with torch.set_grad_enabled(adaptive):
                real, (fake, rows, _, _) = self.forward(batch, step)
            if entropy:
                codes = self.model.quantizer.codes()
                mean = mean_distribution(rows, codes, config.entropy_temperature) / len(batches)
                whole.mean = mean if whole.mean is None else whole.mean + mean
            if adaptive:
                loss, _ = self.pictures_loss(real, fake)
                both = self.gradients(loss, self.adversarial_loss(real, fake)[0]) / len(batches)
                whole.pull = both if whole.pull is None else whole.pull + both
        if whole.pull is not None:
            whole.pull = self.adaptive(whole.pull)
        return whole

    def start_codebook(self, each_step: int) -> None:
        """Make the codebook by k-means over the latents of the warm start, `each_step` a step."""
        codebook, pool = self.model.quantizer.codebook, self.codebook.pool
        rows = pool[-self.config.quantize_from * each_step :]  # those that were collected
        if len(rows) < len(codebook):
            raise UserError(
                f"{len(rows)} latents for {len(codebook)} codes: set loss.quantize_from to "
                f"{-(-len(codebook) // each_step)} or more"
            )
        centres, count = kmeans(rows, len(codebook))
        self.codebook.start(codebook, centres, count * each_step / len(rows))

    def pictures_loss(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """How far copies are from their pictures, and each term apart."""
        config = self.config
        logs = {"reconstruction": self.reconstruction(real, fake)}
        loss = logs["reconstruction"]
        if config.gradient:
            logs["edges"] = losses.gradient_loss(real, fake)
            loss = loss + config.gradient * logs["edges"]
        if self.perceptual:
            logs["perceptual"] = self.perceptual(real, fake)
            loss = loss + config.perceptual * logs["perceptual"]
        return loss, logs

    def adversarial_loss(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """How little copies look like pictures to the discriminator, and each term apart."""
        critic = self.parts["discriminator"].requires_grad_(False)
        logits, features = critic(fake)
        logs = {"adversarial": self.of_generator(logits)}
        loss = logs["adversarial"]
        if self.config.feature_matching:
            with torch.no_grad():
                target = critic(real)[1]
            logs["features"] = losses.feature_matching(target, features)
            loss = loss + self.config.feature_matching * logs["features"]
        return loss, logs

    def ramp(self, step: int) -> float:
        """How much of the adversarial loss the generator feels yet, from 0 to 1."""
        config = self.config
        return losses.ramp(step, config.generator_from, config.ramp) if config.adversarial else 0.0

    def gradients(self, loss: Tensor, adversarial: Tensor) -> Tensor:
        """Of both losses at the decoder's last kernel, stacked."""
        last = self.model.decoder.conv_out.weight
        return torch.stack([losses.last_layer_gradient(x, last) for x in (loss, adversarial)])

    def adaptive(self, gradients: Tensor) -> Tensor:
        return losses.adaptive_weight(gradients[0], gradients[1], self.config.adaptive_max)

    def discriminate(self, real: Tensor, fake: Tensor, step: int) -> Loss:
        """The discriminator's loss, a mean over images; steepness is punished at every
        `r1_every`-th step alone, and then as many times as hard."""
        config = self.config
        critic = self.parts["discriminator"].requires_grad_(True)
        on_real, on_fake = critic(real)[0], critic(fake)[0]
        loss = self.of_discriminator(on_real, on_fake)
        right = ((on_real > 0).to(loss).mean() + (on_fake < 0).to(loss).mean()) / 2
        logs = {"discriminator": loss, "discriminator_accuracy": right}
        if config.r1 and (step - config.discriminator_from) % config.r1_every == 0:
            logs["r1"] = losses.r1_penalty(critic, real)
            loss = loss + config.r1 * config.r1_every * logs["r1"]
        return loss, float(len(real)), logs

    @torch.no_grad()
    def follow(self, rows: Tensor, tokens: Tensor, step: int) -> None:
        """Move the codebook after its latents, and dead codes onto some of them."""
        codebook = self.model.quantizer.codebook
        self.codebook.update(codebook, rows, tokens, move=self.config.average)
        if step < self.config.restart_until:
            self.codebook.restart(codebook, rows)

    @torch.no_grad()
    def validate(self, model: VQGAN, batches: Iterable[Batch]) -> dict[str, float]:
        """PSNR in dB (mean over images, after rounding to uint8), L1, code usage and perplexity."""
        psnr, l1, tokens = [], [], []
        for batch in batches:
            real = batch["image"].float() / 255
            ids = model.encode(real)
            fake = (model.decode(ids) * 255).round() / 255
            error = (fake - real).square().mean((1, 2, 3))  # (B,)
            psnr.append(-10 * error.clamp_min(1e-10).log10())
            l1.append((fake - real).abs().mean((1, 2, 3)))
            tokens.append(ids.flatten())
        if not tokens:
            raise UserError("there is no image to validate on")
        share, perplexity = usage(torch.cat(tokens), model.config.codebook_size)
        return {
            "psnr": torch.cat(psnr).mean().item(),
            "l1": torch.cat(l1).mean().item(),
            "usage": share,
            "perplexity": perplexity,
        }

    @torch.no_grad()
    def draw(self, model: VQGAN, batch: Batch) -> Tensor:
        """Originals above their reconstructions, (3, H, W) in [0, 1]."""
        from torchvision.utils import make_grid

        real = batch["image"][:32].float() / 255
        fake = model.decode(model.encode(real))
        rows = [torch.cat(p) for p in zip(real.split(16), fake.split(16), strict=True)]
        return make_grid(torch.cat(rows), nrow=min(16, len(real)), pad_value=1.0)

    def export(self, model: Any, folder: Path) -> None:
        """Write the (averaged) tokenizer as the `vqgan` of a model folder."""
        model.save_pretrained(folder / "vqgan")
