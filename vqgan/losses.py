"""What a tokenizer learns from: how near a reconstruction is to its image, and how real it looks.

Images are float (B, 3, H, W) in [0, 1], logits of any shape; every loss is a mean in float32, or
in float64 where what it compares is.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.common import UserError
from maskgit.common.precision import widen
from maskgit.common.processes import all_reduce, world


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (widen(x) - widen(y)).abs().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference."""
    return (widen(x) - widen(y)).square().mean()


RECONSTRUCTION = {"l1": l1, "l2": l2}


def gradient_loss(x: Tensor, y: Tensor, scales: int = 3) -> Tensor:
    """L1 between the finite differences of two images, down and across, averaged over scales.

    Scale k is the image averaged over blocks of 2 ** k pixels, so sides are at least 2 ** scales.
    L1 alone accepts a blurred edge; here a blurred edge costs at each scale finer than the blur.
    """
    # Differences and block means are linear: it is enough to take those of x - y.
    d = widen(x) - widen(y)
    total = d.new_zeros(())
    for scale in range(scales):
        d = F.avg_pool2d(d, 2) if scale else d  # (B, 3, H/2^k, W/2^k)
        total = total + d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
    return total / scales


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the hinge losses of real (wanted above 1) and fake (below -1); 1 if undecided."""
    return (F.relu(1 - widen(real_logits)).mean() + F.relu(1 + widen(fake_logits)).mean()) / 2


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """Minus the mean logit (Lim and Ye 2017, Geometric GAN)."""
    return -widen(fake_logits).mean()


def non_saturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the cross entropies of real as 1 and fake as 0; log 2 if undecided."""
    real, fake = widen(real_logits), widen(fake_logits)
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def non_saturating_generator(fake_logits: Tensor) -> Tensor:
    """Cross entropy of fake as 1 (Goodfellow et al. 2014, section 3): steep where it is caught."""
    return F.softplus(-widen(fake_logits)).mean()


ADVERSARIAL = {  # name -> (loss of the discriminator, loss of the generator)
    "hinge": (hinge_discriminator, hinge_generator),
    "non-saturating": (non_saturating_discriminator, non_saturating_generator),
}


def feature_matching(real_features: Sequence[Tensor], fake_features: Sequence[Tensor]) -> Tensor:
    """L1 between a discriminator's features of both, mean over layers (Wang et al. 2018, eq. 4).

    The real features are a fixed target: no gradient goes through them.
    """
    pairs = zip(real_features, fake_features, strict=True)
    return torch.stack([l1(real.detach(), fake) for real, fake in pairs]).mean()


def r1_penalty(critic: nn.Module, real: Tensor) -> Tensor:
    """1/2 E |grad D(real)|^2, steepness at real pictures (Mescheder et al. 2018, eq. 9).

    `critic` takes pictures (B, 3, H, W) and gives logits (B, ...) first. Of several logits a
    picture, one a patch, the gradient is that of their sum, and its square is shared out among
    them, so that it weighs against losses that are means over patches as one logit would. It is
    dear: taken at every k-th step, and then k times, it does as much (Karras et al. 2020,
    StyleGAN2, appendix B, lazy regularization).
    """
    with torch.autocast(real.device.type, enabled=False):  # squares of small numbers
        pictures = widen(real).detach().requires_grad_()
        logits = critic.forward(pictures)[0]  # not compiled, which allows no second derivative
        (gradient,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    return widen(gradient).square().sum() / (2 * logits.numel())


def last_layer_gradient(loss: Tensor, last_layer: Tensor) -> Tensor:
    """The gradient of `loss` at one kernel, of its shape; the graph stays for more."""
    return torch.autograd.grad(loss, last_layer, retain_graph=True)[0]


def adaptive_weight(
    reconstruction_gradient: Tensor, adversarial_gradient: Tensor, maximum: float
) -> Tensor:
    """The generator's adversarial weight lambda (Esser et al. 2021, eq. 7), in [0, maximum].

    The ratio of the two losses' gradient norms at the decoder's last kernel, so that neither
    drowns the other; takes the gradients themselves, of this process's pictures, because norms
    cannot be averaged over processes. Bounded, because a discriminator that is sure of itself
    hardly has a gradient and the ratio then explodes. Never differentiated.
    """
    both = torch.stack([widen(reconstruction_gradient), widen(adversarial_gradient)]).detach()
    reconstruction, adversarial = (all_reduce(both) / world()).flatten(1).norm(dim=1)
    # The published sum with a small number, in place of this maximum, would make the ratio depend
    # on how large both are.
    tiny = torch.finfo(adversarial.dtype).tiny
    return (reconstruction / adversarial.clamp_min(tiny)).clamp(max=maximum)


def ramp(step: int, start: int, length: int) -> float:
    """0 up to step `start`, then linear to 1 at `start + length` (length 0: at once)."""
    return min(max(step - start, 0) / length, 1.0) if length else float(step >= start)


class Perceptual(nn.Module):
    """LPIPS distance (Zhang et al. 2018), mean over the batch, of images at least 16 pixels wide.

    Frozen, and always in eval mode: its dropout stays off whatever a parent's `train()` says.
    """

    def __init__(self, vgg: dict[str, Tensor]) -> None:
        """`vgg`: state dict of torchvision's VGG-16; LookupError or RuntimeError if it is not."""
        import lpips  # a second or two, and only this loss wants it

        super().__init__()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips uses a deprecated argument of torchvision
            self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        trunk = self.lpips.net  # "slice2.5.weight" there is "features.5.weight" in VGG-16
        names = {own: "features." + own.partition(".")[2] for own in trunk.state_dict()}
        trunk.load_state_dict({own: vgg[name] for own, name in names.items()}, strict=True)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Perceptual":
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # its square roots need float32
            x, y = widen(x), widen(y)
            lpips = self.lpips.to(x.device, x.dtype)  # no trained part: nothing else moves it
            return lpips(x, y, normalize=True).mean()


def perceptual(vgg_path: str | Path) -> Perceptual:
    """The perceptual loss on a VGG-16 from a local file. Call before training starts.

    Nothing is fetched, and no random network stands in: without the file it is a UserError.
    """
    path = Path(vgg_path).expanduser()
    fetch = (
        "fetch vgg16-397923af.pth (torchvision's VGG-16, 528 MB) from the torchvision model zoo "
        f"and put it at {path}, or set the perceptual weight to 0"
    )
    if not path.is_file():
        raise UserError(f"the perceptual loss needs VGG weights and {path} is no file: {fetch}")
    try:
        return Perceptual(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, UnpicklingError, RuntimeError, LookupError, TypeError):
        raise UserError(f"{path} is truncated or no state dict of VGG-16: {fetch}") from None
