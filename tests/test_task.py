"""The transformer's training: what is asked of it, how it is counted, and that it learns."""

import io
import math
import tarfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import first_loss
from PIL import Image

from maskgit.common import UserError
from maskgit.decode import decode
from maskgit.engine.optim import decay_groups, warmup_cosine
from maskgit.guidance import guided
from maskgit.model import SIZES, MaskGIT, MaskGITConfig
from maskgit.pipeline import Pipeline
from maskgit.task import MaskGITLossConfig, MaskGITTask, accuracy_by_ratio, masked_loss
from vqgan import VQGAN, VQGANConfig
from vqgan.quantizer import QuantizerConfig

SHARD = Path(__file__).parents[1] / "maskgit/assets/emoji/data/emoji-heldout.tar"


def make_task(**changes) -> MaskGITTask:
    """A task with a small model for eight classes of 6 x 6 tokens out of eight codes."""
    shape = dict(codebook_size=8, num_classes=8, grid=[6, 6], dropout=0.0) | SIZES["tiny"]
    for field in fields(MaskGITConfig):
        if field.name in changes:
            shape[field.name] = changes.pop(field.name)
    torch.manual_seed(0)
    quantizer = QuantizerConfig(shape["codebook_size"], 4)
    tokenizer = VQGAN(VQGANConfig(8, [1, 1], 1, 1, 4, groups=4, quantizer=quantizer))
    model = MaskGIT(MaskGITConfig(**shape))
    return MaskGITTask(model, MaskGITLossConfig(**changes), tokenizer)


def drawn_tokens(model: MaskGIT) -> torch.Tensor:
    """One image of each of the eight classes, as tokens (8, N)."""
    config = model.config
    tokens = torch.full((8, config.tokens), config.mask_id)
    return decode(guided(model, torch.arange(8), 2.0), tokens, config.mask_id, seeds=range(8))


@pytest.fixture(scope="module")
def drawings() -> dict[str, torch.Tensor]:
    """Eight emoji as 6 x 6 tokens, which are eight levels of grey, each a class of its own."""
    tokens = []
    with tarfile.open(SHARD) as shard:
        for name in [n for n in shard.getnames() if n.endswith(".png")][:8]:
            image = Image.open(io.BytesIO(shard.extractfile(name).read()))
            tokens.append(list(image.convert("L").resize((6, 6)).tobytes()))
    grid = torch.tensor(tokens) // 32
    return {"tokens": grid, "label": torch.arange(8), "seed": torch.arange(8)}


def example(batch: int = 6, n: int = 9, k: int = 5):
    torch.manual_seed(0)
    logits = torch.randn(batch, n, k, requires_grad=True)
    mask = torch.rand(batch, n) < torch.linspace(0.3, 0.9, batch)[:, None]
    return logits, torch.randint(k, (batch, n)), mask


# The loss.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_loss_is_cross_entropy_on_the_masked_or_on_all(smoothing):
    logits, targets, mask = example()
    total, weight = masked_loss(logits, targets, mask, 0.0, smoothing)
    assert weight == mask.sum()
    expected = F.cross_entropy(logits[mask], targets[mask], label_smoothing=smoothing)
    torch.testing.assert_close(total / weight, expected)

    total, weight = masked_loss(logits, targets, mask, 1.0, smoothing)
    assert weight == mask.numel()
    expected = F.cross_entropy(logits.mT, targets, label_smoothing=smoothing)
    torch.testing.assert_close(total / weight, expected)


def test_masked_loss_weighs_the_known_and_smooths_as_the_formula_says():
    logits, targets, mask = example()
    total, weight = masked_loss(logits, targets, mask, unmasked_weight=0.1, label_smoothing=0.2)
    expected, weights = 0.0, 0.0
    log_p = logits.detach() - logits.detach().exp().sum(-1, keepdim=True).log()
    for b, n in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        w = 1.0 if mask[b, n] else 0.1
        nll = -0.8 * log_p[b, n, targets[b, n]] - 0.2 * log_p[b, n].mean()
        expected, weights = expected + w * nll, weights + w
    torch.testing.assert_close(total.detach(), expected)
    assert weight.item() == pytest.approx(weights, rel=1e-5)


def test_sums_over_parts_of_a_batch_give_the_gradient_of_the_whole():
    logits, targets, mask = example()
    total, weight = masked_loss(logits, targets, mask)
    (whole,) = torch.autograd.grad(total / weight, logits)
    parts = [
        masked_loss(logits[s], targets[s], mask[s]) for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert len({int(w) for _, w in parts}) == 3  # parts that do not weigh the same
    loss = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], whole)


def test_accuracy_by_ratio():
    mask = torch.arange(8) < torch.tensor([1, 2, 3, 4, 8])[:, None]
    hit = torch.arange(8) >= torch.tensor([1, 1, 0, 1, 2])[:, None]  # known ones do not count
    accuracy = accuracy_by_ratio(hit, mask)
    shares = [hits / masked for hits, masked in accuracy.values()]
    assert list(accuracy) == [
        "accuracy_0-25",
        "accuracy_25-50",
        "accuracy_50-75",
        "accuracy_75-100",
    ]
    torch.testing.assert_close(
        torch.stack(shares),
        torch.tensor([1 / 3, 6 / 7, torch.nan, 6 / 8]),
        equal_nan=True,
    )


# The task.


def test_step_yields_one_loss_that_its_logs_explain(drawings):
    task = make_task()
    part, loss, weight, logs = first_loss(task, drawings)
    assert part == "transformer" and len(list(task.step([drawings], 0))) == 1
    assert loss.requires_grad and logs["loss"] == loss
    assert loss.item() == pytest.approx(math.log(8), abs=0.5)  # knows nothing yet
    hits, masked = logs["accuracy"]
    assert 0 <= hits <= masked == weight


def test_what_is_random_about_an_image_follows_from_its_seed(drawings):
    task = make_task(label_dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        batch = drawings | {"seed": torch.arange(8) + 8 * seed}
        losses.append(first_loss(task, batch)[1].item())
    assert losses[0] == losses[1] != losses[2]
    whole = first_loss(task, drawings)
    halves = [{k: v[part] for k, v in drawings.items()} for part in (slice(3), slice(3, 8))]
    parts = [first_loss(task, half) for half in halves]
    total = sum(loss * weight for _, loss, weight, _ in parts)
    torch.testing.assert_close(total, whole[1] * whole[2])


def test_label_dropout_hides_its_share_behind_the_null_label():
    task = make_task(label_dropout=0.3)
    labels = torch.arange(4000) % 8
    batch = {"label": labels, "seed": torch.arange(4000)}
    dropped = task.drop_labels(batch)
    hidden = dropped == 8
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(dropped[~hidden], labels[~hidden])
    assert labels.max() == 7  # the batch itself is left alone
    assert torch.equal(make_task(label_dropout=0.0).drop_labels(batch), labels)


def test_unconditional_model_trains_on_unlabelled_images(drawings):
    task = make_task(num_classes=0)
    batch = drawings | {"label": torch.full((8,), -1)}
    _, loss, *_ = first_loss(task, batch)
    loss.backward()
    model = task.parts["transformer"]
    assert model.net.label_embedding.weight.grad is not None
    assert task.draw(model.eval(), batch).shape == (3, 58, 114)  # 4 rows of 8, and their frames


def test_validation_masks_are_fixed(drawings):
    task = make_task()
    model = task.parts["transformer"].eval()
    state = torch.get_rng_state()
    batches = [{k: v[i : i + 4] for k, v in drawings.items()} for i in (0, 4)]
    first = task.validate(model, batches)
    assert torch.equal(torch.get_rng_state(), state)  # training is not disturbed
    torch.manual_seed(5)
    assert task.validate(model, batches) == first
    assert task.validate(model, [drawings]) == pytest.approx(first, rel=1e-5)
    assert first["loss"] == pytest.approx(math.log(8), abs=0.5)
    assert 0 <= first["accuracy"] <= 1
    with pytest.raises(UserError, match="no image"):
        task.validate(model, [])


@pytest.mark.parametrize(("architecture", "steps"), [("modern", 120), ("official", 300)])
def test_overfits_eight_drawings(architecture, steps, drawings, tmp_path):
    """Then validation finds everything, and drawing gives back the very drawings."""
    task = make_task(architecture=architecture, label_smoothing=0.0)
    model = task.parts["transformer"]
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=4e-3, betas=(0.9, 0.96))
    before = task.validate(model.eval(), [drawings])
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * warmup_cosine(step, warmup=10, steps=steps)
        batch = drawings | {"seed": torch.arange(8) + 8 * step}
        _, loss, *_ = first_loss(task, batch, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = task.validate(model.eval(), [drawings])
    assert after["loss"] < 0.1 < 1.5 < before["loss"]
    assert after["accuracy"] > 0.98 > 0.5 > before["accuracy"]

    drawn = drawn_tokens(model)
    assert (drawn == drawings["tokens"]).float().mean() > 0.95
    task.export(model, tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path, device="cpu", dtype="fp32")
    assert torch.equal(drawn_tokens(loaded.transformer), drawn)
    assert loaded.sample([3], guidance=2.0).shape == (1, 3, 12, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"label_dropout": 1.5}, "label_dropout=1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"unmasked_weight": 2.0}, "unmasked_weight=2.0"),
        ({"has_null_label": False}, "set label_dropout=0"),
    ],
)
def test_settings_out_of_range_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        make_task(**changes)


# Optimizer and schedule, as each task has them.


@pytest.mark.parametrize("architecture", ["modern", "official"])
def test_only_matrices_decay(architecture):
    model = make_task(architecture=architecture).parts["transformer"]
    model.net.head_bias.requires_grad_(False)
    matrices, others = decay_groups(model, 0.05)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    count = len(matrices["params"]) + len(others["params"])
    assert count == len(list(model.parameters())) - 1


def test_warmup_cosine():
    rates = [warmup_cosine(step, warmup=4, steps=14, final=0.1) for step in range(16)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.55)  # half way down
    assert rates[14:] == pytest.approx([0.1, 0.1])
    assert rates[4:15] == sorted(rates[4:15], reverse=True)
