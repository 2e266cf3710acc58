import pytest
import torch
from torch import nn

from maskgit.common import UserError
from vqgan.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    Spectral,
    fitting_layers,
    receptive_field,
)
from vqgan.losses import feature_matching, hinge_generator, non_saturating_discriminator


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(norm="group", layers=None, size=32):
    return Discriminator(DiscriminatorConfig(channels=8, layers=layers, norm=norm), size)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_receptive_field_is_as_stated(layers):
    """Counted: the pixels whose change moves the middle logit."""
    net = small("none", layers, size=160)
    pixels = torch.rand(1, 3, 160, 160, requires_grad=True)
    logits, _ = net(pixels)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows = pixels.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == receptive_field(layers)


def test_layers_fit_the_picture():
    fitted = {size: fitting_layers(size) for size in (16, 33, 34, 64, 69, 70, 256, 1024)}
    assert fitted == {16: 1, 33: 1, 34: 2, 64: 2, 69: 2, 70: 3, 256: 3, 1024: 3}
    assert all(receptive_field(layers) <= size for size, layers in fitted.items())
    with pytest.raises(UserError, match="16 pixels"):
        fitting_layers(15)


@pytest.mark.parametrize("norm", ["group", "spectral", "none"])
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (17, 40)])
def test_logits_are_a_map_and_features_one_for_each_hidden_layer(norm, size):
    net = small(norm, size=min(size))
    logits, features = net(torch.rand(2, 3, *size))
    layers = fitting_layers(min(size))
    expected = tuple(side // 2**layers - 2 for side in size)
    assert logits.shape == (2, 1, *expected) and logits.dtype == torch.float32
    assert len(features) == layers + 1
    assert [f.shape[1] for f in features] == [8 * 2**i for i in range(layers + 1)]


def test_pictures_enter_in_both_signs_and_logits_leave_in_float32():
    net = small("none")
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.rand(1, 3, 32, 32))[0].dtype == torch.float32
    grey, first = torch.full((1, 3, 32, 32), 0.5), net.main[0]
    expected = nn.functional.leaky_relu(first.bias, 0.2).view(1, -1, 1, 1)
    assert torch.allclose(net(grey)[1][0], expected.expand(1, 8, 16, 16))  # grey is 0


def test_a_patch_of_16_pixels_is_enough_and_a_misfit_is_told():
    assert small(size=16)(torch.rand(1, 3, 16, 16))[0].shape == (1, 1, 6, 6)
    for layers in (0, 4):
        with pytest.raises(UserError, match="do not fit"):
            small(layers=layers, size=32)
    with pytest.raises(UserError, match="group"):
        DiscriminatorConfig(norm="groups")


def test_layout_is_the_published_one():
    """Names and shapes of taming's three-layer PatchGAN, its BatchNorm's running numbers aside."""
    expected = {
        "main.0.weight": (64, 3, 4, 4),
        "main.0.bias": (64,),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.3.bias": (128,),
        "main.5.weight": (256, 128, 4, 4),
        "main.6.weight": (256,),
        "main.6.bias": (256,),
        "main.8.weight": (512, 256, 4, 4),
        "main.9.weight": (512,),
        "main.9.bias": (512,),
        "main.11.weight": (1, 512, 4, 4),
        "main.11.bias": (1,),
    }
    net = Discriminator(DiscriminatorConfig(), size=256)
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == expected


@pytest.mark.parametrize("norm", ["group", "spectral", "none"])
def test_every_parameter_learns_and_reals_leave_fakes_alone(norm):
    net = small(norm)
    real, fake = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    non_saturating_discriminator(net(real)[0], net(fake.detach())[0]).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert fake.grad is None
    logits, features = net(fake)
    (hinge_generator(logits) + feature_matching(net(real)[1], features)).backward()
    assert fake.grad.isfinite().all() and fake.grad.any()


@pytest.mark.parametrize("norm", ["group", "spectral", "none"])
def test_a_picture_is_judged_alone(norm):
    """No statistic crosses the batch, as it would with BatchNorm."""
    net, pictures = small(norm).eval(), torch.rand(3, 3, 32, 32)
    together = net(pictures)[0]
    alone = torch.cat([net(picture[None])[0] for picture in pictures])
    assert torch.allclose(together, alone, atol=1e-5)


def test_spectral_norm_bounds_each_kernel():
    net = small("spectral")
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for conv in convolutions:
            conv.parametrizations.weight.original.mul_(30)
        norms = [torch.linalg.matrix_norm(c.weight.flatten(1), 2).item() for c in convolutions]
    assert norms == pytest.approx([1.0] * 3, abs=1e-3)


def test_spectral_norm_has_the_gradient_of_the_singular_value():
    kernel = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def by_singular_value(kernel):
        return kernel / torch.linalg.matrix_norm(kernel.flatten(1), 2)

    weights = torch.randn_like(kernel)
    grads = [
        torch.autograd.grad((f(kernel) * weights).sum(), kernel)[0]
        for f in (Spectral(), by_singular_value)
    ]
    assert torch.allclose(*grads, rtol=1e-9)
    with torch.autocast("cpu", torch.bfloat16):
        assert Spectral()(kernel.float()).dtype == torch.float32
    assert not Spectral()(torch.zeros(4, 3, 2, 2)).any()


@pytest.mark.parametrize("norm", ["group", "spectral", "none"])
def test_a_pass_leaves_nothing_behind_and_two_halves_are_one_batch(norm):
    """No state but the weights, so it is the same whatever came before, and float64 stays."""
    net, pictures = small(norm).double(), torch.rand(4, 3, 32, 32, dtype=torch.float64)
    assert not list(net.buffers())
    net(pictures)[0].square().mean().backward()
    whole = [p.grad for p in net.parameters()]
    assert all(g.dtype == torch.float64 for g in whole)
    net.zero_grad()
    for half in pictures.split(2):
        logits, _ = net(half)
        (logits.square().mean() / 2).backward()
    assert logits.dtype == torch.float64
    for a, b in zip(whole, net.parameters(), strict=True):
        assert torch.allclose(a, b.grad, rtol=1e-10, atol=1e-14)


def test_it_learns_to_tell_noise_from_flat_pictures():
    net = small()
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    for _ in range(30):
        flat = torch.rand(4, 3, 1, 1).expand(4, 3, 32, 32)
        loss = non_saturating_discriminator(net(flat)[0], net(torch.rand(4, 3, 32, 32))[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.35  # half of log 2, where it begins
