import math
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from maskgit.common import UserError
from vqgan import losses


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(*size):
    return torch.rand(2, 3, *(size or (16, 16)))


def test_l1_and_l2_are_means_over_everything():
    x = torch.tensor([0.0, 0.5, 1.0, 0.25]).view(1, 1, 2, 2).expand(2, 3, 2, 2)
    y = torch.zeros_like(x)
    assert losses.l1(x, y).item() == pytest.approx(1.75 / 4)
    assert losses.l2(x, y).item() == pytest.approx(1.3125 / 4)
    assert losses.l1(x.bfloat16(), y).dtype == losses.l2(x.bfloat16(), y).dtype == torch.float32


def test_every_loss_stays_in_float64(distance):
    x, y = images().double(), images().double()
    for loss in (losses.l1, losses.l2, losses.gradient_loss, distance):
        wide, narrow = loss(x, y), loss(x.float(), y.float())
        assert (wide.dtype, narrow.dtype) == (torch.float64, torch.float32)
        assert wide.item() == pytest.approx(narrow.item(), rel=1e-4)
        assert wide.item() != narrow.item()  # nothing on the way was rounded
    for discriminator, generator in losses.ADVERSARIAL.values():
        assert discriminator(x, y).dtype == generator(y).dtype == torch.float64


def test_gradient_loss_of_an_upright_edge():
    # Black left half, white right half, against black: one step of 1 in each row, at every scale.
    edge = torch.zeros(2, 3, 16, 16)
    edge[..., 8:] = 1
    expected = (1 / 15 + 1 / 7 + 1 / 3) / 3
    black = torch.zeros_like(edge)
    assert losses.gradient_loss(edge, black).item() == pytest.approx(expected)
    assert losses.gradient_loss(edge.mT, black).item() == pytest.approx(expected)
    assert losses.gradient_loss(edge, black, scales=1).item() == pytest.approx(1 / 15)


def test_gradient_loss_sees_edges_and_not_brightness():
    x = images()
    assert losses.gradient_loss(x + 0.25, x).item() == pytest.approx(0, abs=1e-6)
    # A checkerboard vanishes in block means: it costs at the finest scale alone.
    board = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float()
    board = board.expand(1, 3, 16, 16)
    loss = losses.gradient_loss(board, torch.zeros_like(board), scales=2)
    assert loss.item() == pytest.approx((1 + 1) / 2)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 11)])
def test_gradient_loss_is_finite_on_odd_and_small_sizes(size):
    x = images(*size).requires_grad_()
    losses.gradient_loss(x, images(*size)).backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_gradient_loss_equals_the_sum_over_both_pyramids():
    x, y = images(), images()
    expected = 0.0
    for k in range(3):
        a, b = (F.avg_pool2d(i, 2**k) for i in (x, y))
        for dim in (2, 3):
            expected += (a.diff(dim=dim) - b.diff(dim=dim)).abs().mean().item() / 3
    assert losses.gradient_loss(x, y).item() == pytest.approx(expected, rel=1e-5)


def test_hinge_closed_form():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert losses.hinge_discriminator(real, fake).item() == pytest.approx((0.25 + 0.75) / 2)
    assert losses.hinge_generator(fake).item() == pytest.approx(1.25)


def test_non_saturating_equals_binary_cross_entropy():
    real, fake = torch.randn(5), torch.randn(5)
    bce = F.binary_cross_entropy_with_logits
    discriminator = (bce(real, torch.ones(5)) + bce(fake, torch.zeros(5))) / 2
    generator = bce(fake, torch.ones(5))
    assert losses.non_saturating_discriminator(real, fake).item() == pytest.approx(
        discriminator.item()
    )
    assert losses.non_saturating_generator(fake).item() == pytest.approx(generator.item())


@pytest.mark.parametrize(("name", "undecided"), [("hinge", 1.0), ("non-saturating", math.log(2))])
def test_adversarial_losses_pull_the_right_way(name, undecided):
    discriminator, generator = losses.ADVERSARIAL[name]
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    loss = discriminator(real, fake)
    assert loss.item() == pytest.approx(undecided)
    loss.backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()  # descent raises real, lowers fake
    fake.grad = None
    generator(fake).backward()
    assert (fake.grad < 0).all()  # descent makes fake look real


def test_feature_matching_moves_the_fake_alone():
    real = [torch.full((2, 4), 3.0, requires_grad=True), torch.ones(2, 9, requires_grad=True)]
    fake = [torch.full((2, 4), 1.0, requires_grad=True), torch.zeros(2, 9, requires_grad=True)]
    loss = losses.feature_matching(real, fake)
    assert loss.item() == pytest.approx((2 + 1) / 2)  # layers weigh the same, whatever their size
    loss.backward()
    assert all(f.grad is None for f in real)
    assert all((f.grad < 0).all() for f in fake)


def test_ramp():
    values = [losses.ramp(step, start=10, length=4) for step in (0, 9, 10, 11, 13, 14, 99)]
    assert values == [0, 0, 0, 0.25, 0.75, 1, 1]
    assert [losses.ramp(step, start=10, length=0) for step in (9, 10, 11)] == [0, 1, 1]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file like torchvision's, of a VGG-16 with random weights, and those weights."""
    torch.manual_seed(0)
    trunk = make_layers(cfgs["D"], batch_norm=False)
    state = {f"features.{name}": tensor for name, tensor in trunk.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, path)
    return path, trunk


@pytest.fixture(scope="module")
def distance(vgg):
    return losses.perceptual(vgg[0])


def lpips_by_hand(trunk, x, y):
    """LPIPS as in Zhang et al. 2018, eq. 1, on VGG's five stages, from [0, 1] images."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    heads = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    heads = torch.load(heads, map_location="cpu", weights_only=True)
    a, b = ((2 * i - 1 - shift) / scale for i in (x, y))
    total = 0
    for k, (first, end) in enumerate([(0, 4), (4, 9), (9, 16), (16, 23), (23, 30)]):
        a, b = trunk[first:end](a), trunk[first:end](b)
        squares = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        head = heads[f"lin{k}.model.1.weight"].view(1, -1, 1, 1)
        total = total + (squares * head).sum(dim=1).mean(dim=(1, 2))
    return total.mean()


def test_perceptual_equals_lpips_by_hand(vgg, distance):
    x, y = images(), images()
    with torch.no_grad():
        expected = lpips_by_hand(vgg[1], x, y).item()
        assert expected > 0
        assert distance(x, y).item() == pytest.approx(expected, rel=1e-4)
        assert distance(x, x).item() == 0


def test_perceptual_has_every_tensor_of_the_file(vgg, distance):
    own = distance.lpips.net.state_dict()
    given = vgg[1].state_dict()
    assert sorted(n.partition(".")[2] for n in own) == sorted(given)
    assert all(torch.equal(t, given[n.partition(".")[2]]) for n, t in own.items())


def test_perceptual_is_frozen_and_without_dropout_for_ever(distance):
    parent = nn.ModuleDict({"perceptual": distance}).train()
    assert parent.training and not any(m.training for m in distance.modules())
    assert not any(p.requires_grad for p in distance.parameters())
    x, y = images().requires_grad_(), images()
    loss = distance(x, y)
    assert distance(x, y).item() == loss.item()
    loss.backward()
    assert x.grad.isfinite().all() and x.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(x, y).item() == loss.item()


def test_perceptual_needs_its_file(tmp_path):
    missing = tmp_path / "vgg16.pth"
    with pytest.raises(UserError) as told:
        losses.perceptual(missing)
    message = str(told.value)
    assert "\n" not in message and str(missing) in message
    assert "vgg16-397923af.pth" in message and "torchvision model zoo" in message


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short"])
def test_perceptual_refuses_a_damaged_file(tmp_path, content):
    path = tmp_path / "vgg16.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth"):
        losses.perceptual(path)


def test_perceptual_refuses_a_trunk_with_a_tensor_missing(tmp_path, vgg):
    state = torch.load(vgg[0], weights_only=True)
    del state["features.28.bias"]
    torch.save(state, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match="no state dict of VGG-16"):
        losses.perceptual(tmp_path / "vgg16.pth")
