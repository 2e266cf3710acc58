"""What one training step of the tokenizer does: parts {generator, discriminator, codebook}."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskgit.common import UserError, pick
from vqgan import losses
from vqgan.codebook import CodebookAverage, entropy_loss, kmeans, usage
from vqgan.discriminator import Discriminator, DiscriminatorConfig
from vqgan.model import VQGAN

Batch = dict[str, Tensor]


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
    discriminator_from: int = 0  # the discriminator trains alone from here on ...
    generator_from: int = 1000  # ... to here, where the generator begins to feel it ...
    ramp: int = 1000  # ... fully after so many steps


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
        self.perceptual = losses.perceptual(config.vgg) if config.perceptual else None
        self.parts: dict[str, nn.Module] = {"generator": model}
        self.units = {"images": 1}
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

    def step(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The generator's update, then the discriminator's where it takes part."""
        config = self.config
        real = batch["image"].float() / 255  # (B, 3, H, W)
        if config.quantize_from and step == config.quantize_from:
            self.start_codebook(real[:, 0].numel() // self.model.config.factor**2)
        quantized = step >= config.quantize_from
        fake, rows, tokens, quantizer = self.parts["generator"](
            real, config.commitment, config.swapped, quantized
        )
        loss, logs = self.generator_loss(real, fake, step)
        if config.entropy and quantized:
            entropy = entropy_loss(rows, self.model.quantizer.codes(), config.entropy_temperature)
            loss, logs = loss + config.entropy * entropy, {**logs, "entropy": entropy}
        loss = loss + quantizer
        logs |= {"loss": loss, "quantizer": quantizer}
        yield "generator", loss, {k: v.detach() for k, v in logs.items()}

        if not quantized:
            self.codebook.collect(rows.detach())
        elif not config.decoder_only:
            self.follow(rows.detach(), tokens, step)
        if config.adversarial and step >= config.discriminator_from:
            yield self.discriminator_update(real, fake.detach())

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

    def generator_loss(self, real: Tensor, fake: Tensor, step: int) -> tuple[Tensor, dict]:
        """What the pictures cost, and each term apart."""
        config = self.config
        logs = {"reconstruction": self.reconstruction(real, fake)}
        loss = logs["reconstruction"]
        if config.gradient:
            logs["edges"] = losses.gradient_loss(real, fake)
            loss = loss + config.gradient * logs["edges"]
        if self.perceptual:
            logs["perceptual"] = self.perceptual(real, fake)
            loss = loss + config.perceptual * logs["perceptual"]
        ramp = losses.ramp(step, config.generator_from, config.ramp) if config.adversarial else 0.0
        if not ramp:
            return loss, logs
        critic = self.parts["discriminator"].requires_grad_(False)
        logits, features = critic(fake)
        logs["adversarial"] = self.of_generator(logits)
        adversarial = logs["adversarial"]
        if config.feature_matching:
            with torch.no_grad():
                target = critic(real)[1]
            logs["features"] = losses.feature_matching(target, features)
            adversarial = adversarial + config.feature_matching * logs["features"]
        weight = torch.tensor(config.adversarial * ramp, device=real.device)
        if config.adaptive:
            last = self.model.decoder.conv_out.weight
            weight = weight * losses.adaptive_weight(loss, adversarial, last, config.adaptive_max)
        logs["adversarial_weight"] = weight
        return loss + weight * adversarial, logs

    def discriminator_update(self, real: Tensor, fake: Tensor) -> tuple[str, Tensor, dict]:
        critic = self.parts["discriminator"].requires_grad_(True)
        on_real, on_fake = critic(real)[0], critic(fake)[0]
        loss = self.of_discriminator(on_real, on_fake)
        right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        return (
            "discriminator",
            loss,
            {"discriminator": loss.detach(), "discriminator_accuracy": right.detach()},
        )

    @torch.no_grad()
    def follow(self, rows: Tensor, tokens: Tensor, step: int) -> None:
        """Move the codebook after its latents, and dead codes onto some of them."""
        codebook = self.model.quantizer.codebook
        self.codebook.update(codebook, rows, tokens.flatten(), move=self.config.average)
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
