"""The adaptive weight of the adversarial loss, and the penalty on steep discriminators."""

import pytest
import torch
import torch.distributed as dist
from runs import pair
from test_losses import images
from torch import nn

from vqgan import losses
from vqgan.discriminator import Discriminator, DiscriminatorConfig


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def two_gradients():
    """A generator of one hidden and one last layer, and, at the latter, the gradients of two
    losses on what it makes."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    out = net(torch.randn(6, 4))
    both = out.square().mean(), (out * torch.randn(6, 3)).mean()
    gradients = [losses.last_layer_gradient(loss, net[2].weight) for loss in both]
    return net, both, gradients


def test_adaptive_weight_is_the_published_ratio():
    net, both, gradients = two_gradients()
    weight = losses.adaptive_weight(*gradients, maximum=1e4)
    assert not weight.requires_grad
    assert all(p.grad is None for p in net.parameters())  # it leaves no gradient behind
    norms = []
    for loss in both:  # whose graphs are still there
        net.zero_grad()
        loss.backward(retain_graph=True)
        norms.append(net[2].weight.grad.norm().item())
    assert weight.item() == pytest.approx(norms[0] / norms[1], rel=1e-5)


def test_adaptive_weight_is_bounded():
    _, _, (reconstruction, adversarial) = two_gradients()
    assert losses.adaptive_weight(reconstruction, adversarial * 1e-12, 0.75).item() == 0.75
    assert losses.adaptive_weight(reconstruction, adversarial * 0, 0.75).item() == 0.75
    assert losses.adaptive_weight(reconstruction * 0, adversarial, 0.75).item() == 0
    assert losses.adaptive_weight(reconstruction * 0, adversarial * 0, 0.75).item() == 0


def test_adaptive_weight_takes_sums_of_gradients_and_float64():
    _, _, gradients = two_gradients()
    gradients = [g.double() for g in gradients]
    weight = losses.adaptive_weight(*gradients, maximum=1e4)
    assert weight.dtype == torch.float64
    sums = [g * 8 for g in gradients]  # of as many micro-batches
    assert losses.adaptive_weight(*sums, maximum=1e4).item() == pytest.approx(weight.item(), 1e-14)
    half = [g.bfloat16() for g in gradients]
    assert losses.adaptive_weight(*half, maximum=1e4).dtype == torch.float32


def weigh_together(rank, meeting):
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    each = torch.randn(2, 2, 8, 3, dtype=torch.float64)  # process, which loss, gradient
    mine = each[rank]
    before = mine.clone()
    weight = losses.adaptive_weight(mine[0], mine[1], 1e4)
    norms = each.mean(0).flatten(1).norm(dim=1)
    assert abs(weight - norms[0] / norms[1]) < 1e-14, (weight, norms)
    assert torch.equal(mine, before)  # it sums in a copy
    dist.destroy_process_group()


def test_adaptive_weight_of_two_processes_is_that_of_all_pictures(tmp_path):
    pair(weigh_together, tmp_path / "meeting")


class Linear(nn.Module):
    """Logits w . x of a picture, each `k` of them alike."""

    def __init__(self, k=1, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8, dtype=dtype))
        self.k = k

    def forward(self, x):
        return (x * self.w).sum((1, 2, 3))[:, None].expand(-1, self.k), []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_r1_of_a_linear_critic_is_half_its_square(dtype):
    critic, real = Linear(dtype=dtype), images(8, 8).to(dtype)
    penalty = losses.r1_penalty(critic, real)
    assert penalty.dtype == dtype and penalty.ndim == 0
    assert penalty.item() == pytest.approx(critic.w.square().sum().item() / 2, rel=1e-5)
    penalty.backward()
    assert torch.allclose(critic.w.grad, critic.w)
    assert real.grad is None and not real.requires_grad


def test_r1_shares_out_among_patches():
    """Of k equal logits the sum is k times as steep, its square k^2 times, and each has a k-th."""
    critic, real = Linear(k=5), images(8, 8)
    expected = 5 * critic.w.square().sum().item() / 2
    assert losses.r1_penalty(critic, real).item() == pytest.approx(expected, rel=1e-5)


def critic_in_float64(norm):
    return Discriminator(DiscriminatorConfig(channels=4, norm=norm), size=16).double()


@pytest.mark.parametrize("norm", ["group", "spectral", "none"])
def test_r1_and_its_gradient_by_finite_differences(norm):
    critic, real = critic_in_float64(norm), images().double()
    penalty = losses.r1_penalty(critic, real)
    penalty.backward()

    @torch.no_grad()
    def slope(direction, size=1e-5):
        logits = [critic(real + sign * size * direction)[0].sum() for sign in (1, -1)]
        return (logits[0] - logits[1]).item() / (2 * size)

    count = critic(real)[0].numel()
    pictures = real.clone().requires_grad_()
    (steepest,) = torch.autograd.grad(critic(pictures)[0].sum(), pictures)
    norm_of = steepest.norm().item()
    assert slope(steepest / norm_of) ** 2 / (2 * count) == pytest.approx(penalty.item(), rel=1e-5)
    # Along a random direction of the weights the penalty changes as its gradient says.
    moved = list(critic.parameters())
    directions = [torch.randn_like(p) for p in moved]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
    expected = sum((g * d).sum().item() for g, d in zip(grads, directions, strict=True))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(moved, directions, strict=True):
                p.add_(d, alpha=sign * 1e-6)
        ends.append(losses.r1_penalty(critic, real).item())
        with torch.no_grad():
            for p, d in zip(moved, directions, strict=True):
                p.sub_(d, alpha=sign * 1e-6)
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(expected, rel=1e-4)


def test_r1_reaches_all_kernels_and_norms_and_is_wide_under_autocast():
    critic, real = Discriminator(DiscriminatorConfig(channels=8), size=16), images()
    alone = losses.r1_penalty(critic, real)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = losses.r1_penalty(critic, real)
    assert penalty.dtype == torch.float32 and penalty.item() == alone.item() > 0
    penalty.backward()
    reached = {name for name, p in critic.named_parameters() if p.grad is not None and p.grad.any()}
    # What is only added, with no norm behind it, changes no slope.
    others = {name for name, _ in critic.named_parameters()} - reached
    assert others == {"main.3.bias", "main.5.bias"}
