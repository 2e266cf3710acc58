"""Contrastive losses: closed forms, other implementations, several processes, cached gradients."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import first_loss, one_line
from runs import pair

import clip.task
from clip import CLIP, CLIPConfig
from clip.losses import info_nce, sigmoid_loss
from clip.task import CLIPLossConfig, CLIPTask
from maskgit.common import UserError


def features(count=6, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return F.normalize(rows, dim=-1)


def test_features_that_are_all_the_same_give_the_logarithm_of_the_batch():
    rows = F.normalize(torch.ones(5, 4), dim=-1)
    assert info_nce(rows, rows, 20.0).item() == pytest.approx(math.log(5))
    expected = 4 * math.log(1 + math.exp(3)) + math.log(1 + math.exp(-3))
    assert sigmoid_loss(rows, rows, 10.0, -7.0).item() == pytest.approx(expected)


def test_pairs_told_apart_cost_nothing():
    rows = torch.eye(5)
    assert info_nce(rows, rows, 100.0).item() < 1e-6
    assert sigmoid_loss(rows, rows, 100.0, -50.0).item() < 1e-6


def test_losses_equal_those_of_open_clip():
    theirs = pytest.importorskip("open_clip.loss")
    image, text = features()
    scale, bias = torch.tensor(13.0, dtype=torch.float64), torch.tensor(-9.0, dtype=torch.float64)
    expected = theirs.ClipLoss()(image, text, scale)
    assert info_nce(image, text, scale).item() == pytest.approx(expected.item(), rel=1e-12)
    expected = theirs.SigLipLoss()(image, text, scale, bias)
    assert sigmoid_loss(image, text, scale, bias).item() == pytest.approx(
        expected.item(), rel=1e-12
    )


def test_weight_and_smoothing():
    image, text = features()
    logits, target = 9.0 * image @ text.T, torch.arange(6)
    forward = F.cross_entropy(logits, target)
    backward = F.cross_entropy(logits.T, target)
    assert torch.isclose(info_nce(image, text, 9.0, weight=1.0), forward)
    assert torch.isclose(info_nce(image, text, 9.0, weight=0.25), 0.25 * forward + 0.75 * backward)
    smooth = F.cross_entropy(logits, target, label_smoothing=0.1)
    assert torch.isclose(info_nce(image, text, 9.0, weight=1.0, smoothing=0.1), smooth)


def test_positives_share_the_target():
    image, text = features()
    group = torch.tensor([3, 7, 3, 1, 7, 3])
    log_p = (9.0 * image @ text.T).log_softmax(1)
    rows = [log_p[i, group == group[i]].mean() for i in range(6)]
    keys = group[:, None], group
    found = info_nce(image, text, 9.0, keys, weight=1.0)
    assert torch.isclose(found, -torch.stack(rows).mean())
    sign = 2.0 * (group[:, None] == group) - 1
    direct = -F.logsigmoid(sign * (9.0 * image @ text.T - 3.0)).sum() / 6
    assert torch.isclose(sigmoid_loss(image, text, 9.0, -3.0, keys), direct)
    alone = torch.arange(6)[:, None], torch.arange(6)
    assert torch.isclose(info_nce(image, text, 9.0, alone), info_nce(image, text, 9.0))
    pairs = sigmoid_loss(image, text, 9.0, -3.0)
    assert torch.equal(sigmoid_loss(image, text, 9.0, -3.0, alone), pairs)


def test_what_an_image_could_be_called_need_not_hold_the_other_way():
    """Text 1 is a name of image 0, whose own text is no name of image 1."""
    image, text = features(3)
    keys = torch.tensor([[10, 11], [11, -1], [12, -1]]), torch.tensor([10, 11, 12])
    logits = 9.0 * image @ text.T
    forward = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    backward = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], dtype=torch.float64)
    expected = F.cross_entropy(logits, forward) / 2 + F.cross_entropy(logits.T, backward) / 2
    assert torch.isclose(info_nce(image, text, 9.0, keys), expected)


def test_bad_features_are_refused():
    with pytest.raises(UserError) as error:
        info_nce(torch.ones(1, 4), torch.ones(1, 4), 1.0)
    one_line(error, "one pair", "2 or more")
    for loss in (lambda a, b: info_nce(a, b, 1.0), lambda a, b: sigmoid_loss(a, b, 1.0, 0.0)):
        with pytest.raises(UserError) as error:
            loss(torch.ones(4, 8), torch.ones(4, 6))
        one_line(error, "(4, 8)", "(4, 6)")


# ---------------------------------------------------------------- gradients of one big batch


def tiny(loss="infonce"):
    torch.manual_seed(0)
    return CLIP(
        CLIPConfig(
            embed=16,
            image=dict(size=[16, 16], patch=4, width=16, depth=2, heads=2, patch_dropout=0.5),
            text=dict(merges=0, context=6, width=16, depth=1, heads=2),
            loss=loss,
            dropout=0.2,
        )
    ).double()


def tiny_batch(count=6):
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8),
        "text": torch.randint(514, (count, 6), generator=generator),
        "caption": torch.tensor([5, 6, 7, 5, 8, 9])[:count],
        "captions": torch.tensor([[5, 6], [6, -1], [7, 9], [5, -1], [8, -1], [9, 5]])[:count],
        "label": torch.zeros(count, dtype=torch.int64),
        "index": torch.arange(count),
    }


def micro(batch, size):
    """A batch as micro-batches of `size`."""
    parts = {key: value.split(size) for key, value in batch.items()}
    return [{key: value[i] for key, value in parts.items()} for i in range(len(parts["index"]))]


def gradients(model, config, batch, size=6, seed=3):
    """Of one training step, in micro-batches of `size`, without the update."""
    model.train().zero_grad()
    torch.manual_seed(seed)
    task = CLIPTask(model, config, [])
    _, loss, *_ = first_loss(task, *micro(batch, size))
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def close(found, expected):
    """Equal to 1e-9, relative to the largest gradient of the parameter."""
    assert found.keys() == expected.keys()
    for name in found:
        error = (found[name] - expected[name]).abs().max()
        assert error <= 1e-9 * expected[name].abs().max(), name


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("positives", ["pair", "caption"])
def test_cached_gradients_equal_those_of_all_graphs_kept(loss, positives, monkeypatch):
    config = CLIPLossConfig(positives=positives, varied=False)
    cached = gradients(tiny(loss), config, tiny_batch(), 2)
    with monkeypatch.context() as patch:  # the same micro-batches and draws, nothing run again
        patch.setattr(clip.task, "recompute", lambda f, *x, use_reentrant: f(*x))
        kept = gradients(tiny(loss), config, tiny_batch(), 2)
    close(cached, kept)
    assert kept["logit_scale"].abs() > 0
    other = gradients(tiny(loss), config, tiny_batch())
    assert not torch.equal(other["visual.proj.weight"], kept["visual.proj.weight"])  # other draws


def test_cached_gradients_keep_one_micro_batch_at_a_time():
    def peak(size):
        """The most numbers that the graph holds for the backward pass."""
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        model = tiny().train()
        task = CLIPTask(model, CLIPLossConfig(varied=False), [])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            first_loss(task, *micro(tiny_batch(), size))
        return kept

    assert peak(2) < peak(6) / 4


def test_batch_norm_is_refused_with_micro_batches():
    image = dict(tower="resnet", size=[32, 32], width=8, heads=4, blocks=[1, 1, 1, 1])
    text = dict(merges=0, context=6, width=16, depth=1, heads=2)
    model = CLIP(CLIPConfig(embed=16, image=image, text=text))
    task = CLIPTask(model, CLIPLossConfig(), [])
    next(task.step([tiny_batch()], 0))
    with pytest.raises(UserError) as error:
        next(task.step(micro(tiny_batch(), 2), 0))
    one_line(error, "BatchNorm", "train.micro_batch=null")


def learn_together(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    batch = {k: v[3 * rank : 3 * rank + 3] for k, v in tiny_batch().items()}
    result = {}
    for name, loss, config, size in cases():
        model = tiny(loss).eval()  # no draws, which differ between the processes
        _, value, *_ = first_loss(CLIPTask(model, config, ["class"]), *micro(batch, size))
        value.backward()
        dist.all_reduce(value := value.detach())
        result[f"{name}/loss"] = value / 2
        for key, parameter in model.named_parameters():  # as data-parallel training does
            dist.all_reduce(parameter.grad)
            result[f"{name}/{key}"] = parameter.grad / 2
    for _, loss, config, size in cases():  # in training: each process has draws of its own
        model = tiny(loss)
        cached = gradients(model, config, batch, size, seed=rank)
        clip.task.recompute, recompute = lambda f, *x, use_reentrant: f(*x), clip.task.recompute
        close(cached, gradients(model, config, batch, size, seed=rank))
        clip.task.recompute = recompute
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def cases():
    for loss in ("infonce", "sigmoid"):
        for positives in ("pair", "caption"):
            for size in (3, 1):
                config = CLIPLossConfig(positives=positives, varied=False)
                yield f"{loss}-{positives}-{size}", loss, config, size


def test_two_processes_have_the_loss_and_gradients_of_one_batch(tmp_path):
    pair(learn_together, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    close(found[0], found[1])
    expected = {}
    for name, loss, config, _ in cases():
        model = tiny(loss).eval()
        _, value, *_ = first_loss(CLIPTask(model, config, ["class"]), tiny_batch())
        value.backward()
        expected[f"{name}/loss"] = value.detach()
        expected |= {f"{name}/{key}": p.grad for key, p in model.named_parameters()}
    close(found[0], expected)
