"""The engine: resume, checkpoints, averages, configs, token caches; on tiny real tasks."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from maskgit.common import UserError
from maskgit.engine import checkpoint
from maskgit.engine.config import build, differences, merge, parse_overrides, read_yaml
from maskgit.engine.ema import EMA
from maskgit.engine.loop import Stopped, train
from maskgit.engine.state import mixed
from maskgit.engine.task import TrainConfig
from maskgit.engine.tokens import TokenSet, token_batches
from maskgit.model import SIZES, MaskGIT, MaskGITConfig
from maskgit.task import MaskGITLossConfig, MaskGITTask
from vqgan import VQGAN, VQGANConfig
from vqgan.discriminator import DiscriminatorConfig
from vqgan.quantizer import QuantizerConfig
from vqgan.task import VQGANLossConfig, VQGANTask

TINY = VQGANConfig(
    8, [1, 1, 2], 1, 1, 8, groups=4, shortcut="input", quantizer=QuantizerConfig(16, 8)
)
QUIET = dict(device="cpu", dtype="fp32", validate_every=0, draw_every=0, log_every=1)


def vqgan_task(**losses) -> VQGANTask:
    torch.manual_seed(0)
    return VQGANTask(VQGAN(TINY), VQGANLossConfig(**losses), DiscriminatorConfig(8, 1), 16)


def images(start: int):
    """Batches of four 16 x 16 pictures, each a function of its step."""
    step = start
    while True:
        generator = torch.Generator().manual_seed(step)
        picture = torch.randint(256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
        yield {"image": picture, "index": torch.arange(4), "seed": torch.arange(4)}
        step += 1


def maskgit_task() -> MaskGITTask:
    torch.manual_seed(0)
    config = MaskGITConfig(16, 4, [4, 4], **{**SIZES["tiny"], "width": 32})
    return MaskGITTask(MaskGIT(config), MaskGITLossConfig(), VQGAN(TINY), list("abcd"))


def tokens(start: int):
    generator = torch.Generator().manual_seed(5)
    grid = torch.randint(16, (12, 2, 16), generator=generator)
    images = TokenSet([grid.int()], torch.arange(12) % 4, torch.arange(12))
    return token_batches(images, 4, seed=1, start_step=start)


def all_tensors(task, run) -> dict[str, torch.Tensor]:
    """What the newest checkpoint of a run holds, and the exported weights."""
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return {f"{file}/{k}": v for file, part in found[0].items() for k, v in part.items()}


GAN = dict(
    quantize_from=2,
    gradient=1.0,
    adversarial=0.1,
    discriminator_from=3,
    generator_from=4,
    ramp=2,
    feature_matching=1.0,
    entropy=0.1,
)


@pytest.mark.parametrize(
    ("make", "stream"),
    [(lambda: vqgan_task(**GAN), images), (maskgit_task, tokens)],
    ids=["vqgan with all its losses", "maskgit"],
)
def test_resumed_training_is_bitwise_the_same(make, stream, tmp_path):
    seen = {**QUIET, "validate_every": 3, "draw_every": 3}
    config = TrainConfig(steps=8, batch_size=4, warmup=2, **seen)
    one, two = tmp_path / "one", tmp_path / "two"
    sets = {"fixed": lambda: [next(stream(0))]}
    train(make(), stream, sets, config, one)
    asked: list[int] = []

    def interrupted(start):
        """The same batches, and a signal with the fifth of them."""
        asked.append(start)
        for step, batch in enumerate(stream(start), start):
            if step == 4 and start == 0:
                import signal

                signal.raise_signal(signal.SIGTERM)
            yield batch

    with pytest.raises(Stopped) as stopped:
        train(make(), interrupted, sets, config, two)
    assert stopped.value.status == 143
    train(make(), interrupted, sets, config, two)
    assert asked == [0, 4]
    first, second = all_tensors(make(), one), all_tensors(make(), two)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []
    assert train(make(), stream, {}, config, one) is None  # finished: nothing to do


def test_run_folder_has_what_it_should(tmp_path):
    config = TrainConfig(steps=4, batch_size=4, **{**QUIET, "validate_every": 2, "draw_every": 4})
    heldout = {"heldout": lambda: [next(images(99))]}
    last = train(vqgan_task(), images, heldout, config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "heldout/psnr" in line] == [2, 4]
    assert {"loss", "reconstruction", "quantizer", "lr", "images_per_second"} <= last.keys()
    assert (tmp_path / "samples" / "step_00000004.png").stat().st_size > 0
    assert list((tmp_path / "tensorboard").iterdir())
    loaded = VQGAN.from_pretrained(tmp_path / "export")
    assert loaded.encode(torch.rand(1, 3, 16, 24)).shape == (1, 4, 6)


def test_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    task = maskgit_task()
    config = TrainConfig(steps=4, batch_size=4, **QUIET)

    def poisoned(start):
        for step, batch in enumerate(tokens(start), start):
            if step == 2:
                with torch.no_grad():
                    task.parts["transformer"].net.head_bias[0] = float("nan")
            yield batch

    with pytest.raises(UserError, match=r"transformer is not finite at step 2 \(samples \["):
        train(task, poisoned, {}, config, tmp_path)
    assert torch.isfinite(task.parts["transformer"].net.token_embedding.weight).all()


# Checkpoints.


def test_checkpoint_with_a_flipped_byte_is_skipped_and_named(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.full((3,), float(step))}}, {})
    (tmp_path / ".partial-step_00000003").mkdir()
    (tmp_path / ".removed-step_00000000").mkdir()
    damaged = tmp_path / "step_00000002" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    state, manifest, skipped = checkpoint.newest(tmp_path)
    assert manifest["step"] == 1 and state["model"]["w"].tolist() == [1, 1, 1]
    assert any("step_00000002" in why and "hash" in why for why in skipped)
    told = checkpoint.clean(tmp_path)
    assert any("step_00000003" in what and "never completed" in what for what in told)
    assert any("step_00000000" in what and "half deleted" in what for what in told)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_no_complete_checkpoint_is_an_error_and_none_at_all_is_a_start(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(1)}}, {})
    (tmp_path / "step_00000001" / checkpoint.MANIFEST).unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.newest(tmp_path)


def test_old_checkpoints_go_and_the_newest_stay(tmp_path):
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.zeros(1)}}, {}, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_00000010", "step_00000015"]


def test_the_best_checkpoint_stays_as_well(tmp_path):
    scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.1, 5: 0.6}
    for best, kept in ((max, [2, 5]), (min, [4, 5])):
        folder = tmp_path / best.__name__
        for step, score in scores.items():
            state = {"model": {"w": torch.zeros(1)}}
            checkpoint.save(folder, step, state, {"score": score}, keep=1, best=best)
        assert [int(p.name[-1]) for p in checkpoint.steps(folder)] == kept
        assert checkpoint.newest(folder)[1]["step"] == 5


def test_a_run_keeps_its_best_weights(tmp_path):
    """Of a validation score that gets better, then worse."""
    task, scores = maskgit_task(), iter([3.0, 1.0, 2.0, 4.0])
    task.validate = lambda model, batches: {"loss": next(scores)}
    settings = {**QUIET, "validate_every": 1, "save_every": 2, "keep_last": 1}
    config = TrainConfig(steps=4, batch_size=4, keep_best=True, **settings)
    kept = []
    export = task.export
    task.export = lambda model, folder: kept.append(folder.name) or export(model, folder)
    train(task, tokens, {"heldout": lambda: []}, config, tmp_path)
    names = [int(p.name[-1]) for p in checkpoint.steps(tmp_path / "checkpoints")]
    assert names == [2, 4] and sum(name.endswith("best") for name in kept) == 2
    assert {"best", "export"} <= {p.name for p in tmp_path.iterdir()}


def test_a_disk_without_room_is_told_before_anything_is_done(tmp_path, monkeypatch):
    task, config = maskgit_task(), TrainConfig(steps=2, batch_size=4, **QUIET)
    usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"a checkpoint takes \d+ MB, 0 MB are free"):
        train(task, tokens, {}, config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    def run(name, **changes):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        task = maskgit_task() if name[0] == "m" else vqgan_task(**GAN)
        stream = tokens if name[0] == "m" else images
        config = TrainConfig(steps=6, batch_size=4, warmup=1, **changes, **QUIET)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train(task, stream, {}, config, tmp_path / name)
        return all_tensors(task, tmp_path / name), kept

    for kind in ("maskgit", "vqgan"):
        plain, most = run(kind)
        again, least = run(f"{kind}-again", activation_checkpointing=True)
        assert least < most
        assert plain.keys() == again.keys()
        assert [name for name in plain if not torch.equal(plain[name], again[name])] == []


# The moving average.


def test_moving_average_equals_its_closed_form():
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = EMA(module, decay=0.5)
    values = torch.randn(6, 1, 2)
    expected = torch.zeros(1, 2)
    for step, value in enumerate(values):
        module.weight.data = value.clone()
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.module.weight.data, expected)
    assert not ema.module.weight.requires_grad and not ema.module.training


def test_seeds_of_steps_differ():
    assert len({mixed(seed, step) for seed in range(4) for step in range(1000)}) == 4000


# Configs.


@dataclass
class Inner:
    width: int = 1
    rate: float = 0.1


@dataclass
class Outer:
    name: str = "a"
    sizes: list[int] = field(default_factory=lambda: [1])
    inner: Inner = field(default_factory=Inner)


def test_layers_merge_into_the_dataclass():
    overrides = parse_overrides(["inner.rate=1e-3", "sizes=[3, 4]"])
    merged = build(merge(Outer, {"name": "b", "inner": {"width": 7}}, overrides))
    assert merged == Outer("b", [3, 4], Inner(7, 0.001))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (["inner.widht=3"], "no key 'inner.widht': did you mean 'inner.width'"),
        (["nam=3"], "did you mean 'name'"),
        (["inner.width=wide"], "inner.width: .*wide"),
        (["inner"], "write key=value"),
        (["inner=3"], "not a subclass of Inner"),
    ],
)
def test_config_mistakes_are_one_line(layer, message):
    with pytest.raises(UserError, match=message) as caught:
        build(merge(Outer, parse_overrides(layer)))
    assert "\n" not in str(caught.value)


def test_configs_are_found_by_name(tmp_path):
    (tmp_path / "small.yaml").write_text("name: b\n")
    assert read_yaml("small", [tmp_path]) == {"name": "b"}
    with pytest.raises(UserError, match="did you mean 'small'"):
        read_yaml("smal", [tmp_path])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="not YAML"):
        read_yaml("broken", [tmp_path])


def test_differences_name_the_field():
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}
    assert differences(old, new) == ["a.c: 2, now 3"]
