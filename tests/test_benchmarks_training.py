"""The benchmark of training: its rows hold what the table and `compare` want."""

import pytest

from benchmarks import training
from benchmarks.machine import all_convolutions, products_apart
from benchmarks.table import heading, shown

TINY = {
    "emoji_maskgit": (products_apart, ["size=tiny", "train.batch_size=2"]),
    "emoji_decoder": (all_convolutions, ["init=emoji", "train.batch_size=1"]),
    "emoji_classifier": (all_convolutions, ["model.widths=[8,16]", "train.batch_size=2"]),
}


def is_timed(row, repeats):
    assert len(row["seconds"]) == repeats and min(row["seconds"]) > 0
    assert min(row["seconds"]) <= row["median"] <= max(row["seconds"])
    assert len(shown(row, training.COLUMNS)) == len(heading(training.COLUMNS))


@pytest.mark.parametrize("config", TINY)
def test_a_step_has_its_work_its_rates_and_its_limit(config):
    limit, settings = TINY[config]
    row = training.one_step("a step", config, limit, *settings, repeats=2)
    is_timed(row, 2)
    assert row["flops"] > 0 and row["rate"] == row["flops"] / row["median"]
    assert min(row[name] for name in ("limit", "ratio", "matrix", "memory")) > 0
    batch = 1 if config == "emoji_decoder" else 2
    assert row["images"] == pytest.approx(batch / row["median"])
    assert row.get("tokens") == (64 * row["images"] if config == "emoji_maskgit" else None)


def test_a_step_late_in_the_run_has_all_its_losses():
    def work(*settings):
        given = ["init=emoji", "train.batch_size=1", *settings]
        return training.one_step("a step", "emoji_decoder", None, *given, repeats=1)["flops"]

    at_once = [f"loss.{name}=0" for name in ("discriminator_from", "generator_from", "ramp")]
    assert work() == work(*at_once) > work("loss.adversarial=0", "loss.feature_matching=0")


@pytest.mark.slow  # it reads all the bundled drawings
def test_the_shares_of_the_loop_make_up_its_time(monkeypatch):
    monkeypatch.setattr(training, "WARM", 1)
    small = ["model.widths=[8,16]", "train.batch_size=2"]
    row = training.overhead("loop", "emoji_classifier", 11, 0.1, *small)
    is_timed(row, training.BLOCKS)
    assert row["learning"] == row["forward"] + row["backward"] + row["optimizer"]
    parts = [row[name] for name in (*training.STAGES, "rest")]
    assert sum(parts) == pytest.approx(1) and min(parts) > 0


def test_all_bundled_recipes_have_a_step():
    names = {file.stem for folder in training.CONFIGS for file in folder.glob("*.yaml")}
    assert {config for config, *_ in training.STEPS.values()} == names
