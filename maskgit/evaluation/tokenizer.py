"""How well a tokenizer gives back what it was given: its reconstructions, scored."""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from maskgit.common import UserError
from maskgit.common.progress import meter
from maskgit.evaluation.extractors import Extractor
from maskgit.evaluation.quality import l1, psnr, ssim
from maskgit.evaluation.sets import PixelSet
from maskgit.evaluation.statistics import Gaussian, frechet
from vqgan import VQGAN
from vqgan.codebook import usage
from vqgan.losses import Perceptual

COMPARED = {"PSNR (dB)": psnr, "SSIM": ssim, "L1": l1}
SHOWN = 32  # of the worst reconstructions


@dataclass
class Reconstructions:
    """What one pass over a set gathers."""

    per_image: dict[str, list[Tensor]] = field(default_factory=dict)  # metric -> (B,) of each batch
    tokens: list[Tensor] = field(default_factory=list)
    worst: list[tuple[float, int, Tensor, Tensor]] = field(default_factory=list)  # a heap by -PSNR

    def keep_worst(self, quality: Tensor, real: Tensor, fake: Tensor, turn: Iterator[int]) -> None:
        for value, a, b in zip(quality.tolist(), real, fake, strict=True):
            heapq.heappush(self.worst, (-value, next(turn), a, b))
            if len(self.worst) > SHOWN:
                heapq.heappop(self.worst)  # the least of minus the PSNR: the best of them


@torch.inference_mode()
def reconstruct(
    vqgan: VQGAN,
    images: PixelSet,
    device: torch.device,
    extractor: Extractor | None = None,
    perceptual: Perceptual | None = None,
    batch_size: int = 64,
) -> tuple[dict[str, dict[str, float]], list[tuple[float, Tensor, Tensor]]]:
    """Encode and decode every image; its metrics, and the worst: (PSNR, original, reconstruction).

    Reconstructions are rounded to uint8 before anything is measured. rFID (of `extractor`) is
    between the reconstructions and the very same crops, not some other resize of their files.
    """
    found, turn = Reconstructions(), count()
    gaussians = [Gaussian(extractor.dim) for _ in range(2)] if extractor else []
    with meter(len(images), "reconstructing", "images") as advance:
        for batch in images.batches(batch_size):
            real = batch.to(device).float() / 255  # (B, 3, H, W)
            ids = vqgan.encode(real)  # (B, h, w)
            fake = (vqgan.decode(ids) * 255).round() / 255
            if not fake.isfinite().all():
                raise UserError("reconstructions are not finite numbers: look at the weights")
            measured = {name: compare(real, fake) for name, compare in COMPARED.items()}
            if perceptual:
                pairs = zip(real.split(1), fake.split(1), strict=True)
                measured["LPIPS"] = torch.stack([perceptual(a, b) for a, b in pairs])
            for name, values in measured.items():
                found.per_image.setdefault(name, []).append(values.cpu())
            found.tokens.append(ids.flatten().cpu())
            pixels = (fake * 255).byte()
            if extractor:
                for gaussian, some in zip(gaussians, (batch, pixels), strict=True):
                    gaussian.update(extractor(some.to(device))[0].cpu())
            found.keep_worst(measured["PSNR (dB)"].cpu(), batch, pixels.cpu(), turn)
            advance(len(batch))
    metrics = {name: {"value": torch.cat(v).mean().item()} for name, v in found.per_image.items()}
    if extractor:
        real_g, fake_g = gaussians
        name = "rFID" if extractor.name == "inception" else f"rFD-{extractor.name}"
        distance = frechet(fake_g.mean, fake_g.covariance, real_g.mean, real_g.covariance)
        metrics[name] = {"value": distance}
    metrics |= code_metrics(torch.cat(found.tokens), vqgan, images)
    worst = sorted(found.worst, key=lambda item: -item[0])  # lowest PSNR first
    return metrics, [(-value, a, b) for value, _, a, b in worst]


def code_metrics(tokens: Tensor, vqgan: VQGAN, images: PixelSet) -> dict[str, dict[str, float]]:
    """How the codes are used, and what a pixel costs where every code costs the same."""
    codes = vqgan.config.codebook_size
    share, perplexity = usage(tokens, codes)
    pixels = len(images) * images.size[0] * images.size[1]
    return {
        "code usage": {"value": share},
        "perplexity": {"value": perplexity},
        "bits per pixel": {"value": len(tokens) * math.log2(codes) / pixels},
    }
