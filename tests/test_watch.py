"""Warnings from logged values: each fault is told once and says what to do, health is silent."""

import math
import random

import pytest
from tiny_clip import tiny_clip

from clip.task import CLIPLossConfig, CLIPTask
from maskgit.common.watch import Falls, Stays, Watch
from maskgit.evaluation.classifier import Classifier, ClassifierConfig
from maskgit.evaluation.classifier_task import ClassifierLossConfig, ClassifierTask
from maskgit.model import SIZES, MaskGIT, MaskGITConfig
from maskgit.task import MaskGITLossConfig, MaskGITTask
from vqgan import VQGAN, VQGANConfig
from vqgan.discriminator import DiscriminatorConfig
from vqgan.quantizer import QuantizerConfig
from vqgan.task import VQGANLossConfig, VQGANTask

CODES, CHANCE = 1024, 0.005  # a codebook, and how often its most frequent code occurs


def transformer():
    return Watch(
        Stays("loss", "nothing is learnt", low=math.log(CODES) - 0.05, steps=500),
        Stays("accuracy", "no better than the commonest code", high=1.5 * CHANCE),
    )


def tokenizer():
    return Watch(
        Falls("heldout/usage", "codes die", since=300),
        Stays("discriminator_accuracy", "it sees through all", low=0.95, since=2000),
    )


def told(watch, series, every=50, steps=6000, first=1):
    """The warnings that values `series(step)` call forth, logged each `every` steps."""
    lines = []
    for step in range(first - 1 + every, steps + 1, every):
        lines += list(watch(step, series(step)))
    return lines


def noise(step, size):
    return random.Random(step).gauss(0, size)


def warm_up(step, steps=200):
    return 1e-3 * min(step / steps, 1)


# Healthy runs: as the bundled models' were, with the noise of their batches.


@pytest.mark.parametrize("every", [1, 50, 100])
def test_a_transformer_that_learns_is_silent(every):
    def series(step):
        loss = 1.4 + 5.5 * math.exp(-step / 2000) + noise(step, 0.3)
        accuracy = 0.65 - 0.6 * math.exp(-step / 3000) + noise(step + 1, 0.03)
        return {"loss": loss, "accuracy": accuracy, "lr": warm_up(step)}

    assert told(transformer(), series, every) == []


def test_a_slow_start_of_a_large_transformer_is_silent():
    def series(step):
        learnt = 1 / (1 + math.exp((4000 - step) / 300))  # nothing for thousands of steps
        return {
            "loss": math.log(CODES) - 1.5 * learnt,
            "accuracy": CHANCE + 0.05 * learnt,
            "lr": warm_up(step, 4000),
        }

    assert told(transformer(), series, steps=10000) == []


def test_a_tokenizer_that_learns_is_silent():
    def series(step):
        values = {"discriminator_accuracy": 0.5 + 0.4 * math.exp(-abs(step - 1500) / 300)}
        if step % 400 == 0:
            usage = {400: 0.92, 800: 0.99}.get(step, 0.995 + noise(step, 0.002))
            values["heldout/usage"] = usage
        return values

    assert told(tokenizer(), series) == []


def test_one_bad_validation_and_what_came_before_the_codebook_are_silent():
    usages = {200: 1.0, 400: 0.5, 800: 0.9, 1200: 0.3, 1600: 0.9, 2000: 0.75}
    watch = tokenizer()
    assert [list(watch(step, {"heldout/usage": u})) for step, u in usages.items()] == [[]] * 6


def test_a_discriminator_that_trains_alone_may_win():
    def series(step):
        return {"discriminator_accuracy": 1.0 if step < 2300 else 0.7 + noise(step, 0.05)}

    assert told(tokenizer(), series) == []


# Faults.


@pytest.mark.parametrize("every", [1, 50, 100])
def test_loss_that_stays_at_ln_k_is_told_once(every):
    def series(step):
        return {"loss": math.log(CODES) + noise(step, 0.02), "lr": warm_up(step)}

    [line] = told(transformer(), series, every)
    step = int(line.split()[1].rstrip(":"))
    assert 700 <= step <= 700 + 2 * every  # 200 of warm-up, then 500
    assert line.startswith(f"step {step}: loss was 6.9")
    assert line.endswith("over the last 500 steps: nothing is learnt")


@pytest.mark.parametrize("every", [1, 50, 100])
def test_accuracy_that_does_not_leave_chance_is_told_though_the_loss_falls(every):
    def series(step):
        loss = 6.3 + 0.6 * math.exp(-step / 200)
        return {"loss": loss, "accuracy": max(0, CHANCE + noise(step, 0.003)), "lr": 1e-3}

    [line] = told(transformer(), series, every)
    assert line.startswith("step ") and "accuracy was 0.00" in line
    assert "over the last 1000 steps: no better than the commonest code" in line


def test_accuracy_lost_late_is_told():
    def series(step):
        return {"accuracy": 0.3 if step < 3000 else CHANCE, "lr": 1e-3}

    [line] = told(transformer(), series)
    assert 3900 <= int(line.split()[1].rstrip(":")) <= 4100


def test_codes_that_die_are_told_with_both_numbers():
    usages = {400: 0.92, 800: 0.99, 1200: 0.8, 1600: 0.7, 2000: 0.6, 2400: 0.5}
    watch = tokenizer()
    lines = {step: list(watch(step, {"heldout/usage": u})) for step, u in usages.items()}
    assert lines.pop(2000) == ["step 2000: heldout/usage fell from 0.99 to 0.6: codes die"]
    assert set(map(len, lines.values())) == {0}


def test_a_discriminator_that_always_wins_is_told():
    def series(step):
        return {"discriminator_accuracy": min(1.0, 0.985 + noise(step, 0.01))}

    [line] = told(tokenizer(), series)
    assert line.startswith("step 30") and "discriminator_accuracy was 0.98" in line


def test_the_wait_of_a_resumed_run_starts_anew():
    def series(step):
        return {"loss": math.log(CODES), "lr": 1e-3}

    [line] = told(transformer(), series, first=4001)
    assert 4500 <= int(line.split()[1].rstrip(":")) <= 4650


def test_a_learning_rate_that_rises_again_is_a_warm_up():
    def series(step):
        return {"loss": 7.0, "lr": 1e-3 if step < 400 else warm_up(step - 400, 1000) + 1e-3}

    [line] = told(transformer(), series)
    assert 1900 <= int(line.split()[1].rstrip(":")) <= 2000


def test_values_that_a_line_lacks_or_that_are_no_numbers_are_passed_over():
    watch = Watch(Stays("loss", "flat", low=1.0, steps=10))
    assert told(watch, lambda step: {}, every=1, steps=100) == []
    assert told(watch, lambda step: {"loss": math.nan}, every=1, steps=100) == []
    assert told(watch, lambda step: {"other": 5.0}, every=1, steps=100) == []


# What the tasks look at.


def a_tokenizer():
    quantizer = QuantizerConfig(64, 8)
    return VQGAN(
        VQGANConfig(8, [1, 1, 2], 1, 1, 8, groups=4, shortcut="input", quantizer=quantizer)
    )


def maskgit_task():
    config = MaskGITConfig(64, 4, [4, 4], **{**SIZES["tiny"], "width": 32})
    return MaskGITTask(MaskGIT(config), MaskGITLossConfig(), a_tokenizer(), list("abcd"))


def vqgan_task():
    config = VQGANLossConfig(adversarial=0.1, quantize_from=300, generator_from=500, ramp=500)
    return VQGANTask(a_tokenizer(), config, DiscriminatorConfig(8, 1), 16)


def clip_task():
    return CLIPTask(tiny_clip(), CLIPLossConfig())


def classifier_task():
    model = Classifier(ClassifierConfig(num_classes=10))
    return ClassifierTask(model, ClassifierLossConfig(), list("0123456789"))


@pytest.mark.parametrize(
    ("make", "stuck", "told_of"),
    [
        (maskgit_task, {"loss": 4.15, "accuracy": 0.3}, ["ln(codes) = 4.159", "train.lr"]),
        (maskgit_task, {"loss": 3.0, "accuracy": 1 / 64}, ["accuracy was 0.0156", "tokenizer"]),
        (vqgan_task, {"discriminator_accuracy": 0.999}, ["discriminator", "loss.r1"]),
        (clip_task, {"loss_above_chance": -0.01}, ["ln(pairs)", "captions"]),
        (classifier_task, {"loss": 2.29, "top1": 0.1}, ["ln(classes) = 2.303", "train.lr"]),
    ],
)
def test_each_task_warns_of_its_faults(make, stuck, told_of):
    [line] = told(make().watch, lambda step: stuck)
    assert all(part in line for part in told_of), line


def test_the_tokenizer_warns_of_codes_that_fall_out_of_use():
    [line] = told(vqgan_task().watch, lambda step: {"heldout/usage": 1 / (1 + step / 2000)})
    assert "heldout/usage fell" in line and "loss.dead" in line


@pytest.mark.parametrize(
    ("make", "healthy"),
    [
        (maskgit_task, lambda s: {"loss": 1 + 3 * math.exp(-s / 500), "accuracy": s / 9000}),
        (vqgan_task, lambda s: {"heldout/usage": 0.97, "discriminator_accuracy": 0.8}),
        (clip_task, lambda s: {"loss_above_chance": -s / 1000}),
        (classifier_task, lambda s: {"loss": 1 + math.exp(-s / 500)}),
    ],
)
def test_each_task_is_silent_where_all_is_well(make, healthy):
    assert told(make().watch, healthy) == []
