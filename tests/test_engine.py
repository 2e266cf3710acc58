"""The engine: resume, checkpoints, averages, configs, token caches; on tiny real tasks."""

import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from maskgit.common import UserError
from maskgit.engine import checkpoint
from maskgit.engine.config import build, differences, merge, parse_overrides, read_yaml
from maskgit.engine.data import DataConfig, open_images
from maskgit.engine.ema import EMA
from maskgit.engine.loop import Stopped, TrainConfig, mixed, train
from maskgit.engine.tokens import TokenSet, cached, fixed_batches, token_batches, tokenize
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
        yield {"image": picture, "index": torch.arange(4)}
        step += 1


def maskgit_task() -> MaskGITTask:
    torch.manual_seed(0)
    config = MaskGITConfig(16, 4, [4, 4], **{**SIZES["tiny"], "width": 32})
    return MaskGITTask(MaskGIT(config), MaskGITLossConfig(), VQGAN(TINY), list("abcd"))


def tokens(start: int):
    generator = torch.Generator().manual_seed(5)
    grid = torch.randint(16, (12, 2, 16), generator=generator)
    images = TokenSet(grid.int(), torch.arange(12) % 4, torch.arange(12))
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
    assert asked == [0, 5]
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
    damaged = tmp_path / "step_00000002" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    state, manifest, skipped = checkpoint.newest(tmp_path)
    assert manifest["step"] == 1 and state["model"]["w"].tolist() == [1, 1, 1]
    assert any("step_00000002" in why and "hash" in why for why in skipped)
    assert any("step_00000003" in why and "never completed" in why for why in skipped)


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


# Cached tokens.


@pytest.fixture(scope="module")
def some_emoji():
    config = DataConfig(path="emoji:heldout", size=[16, 16], no_mirror=["country-flag"])
    images = open_images(config)
    images.items = images.items[:40] + images.items[-20:]
    images.labels = images.labels[:40] + images.labels[-20:]
    images.config = replace(config, mirror=True)
    return images


def test_tokens_are_those_of_the_images_and_of_their_mirror_images(some_emoji):
    vqgan = VQGAN(TINY).eval()
    with torch.no_grad():
        cache = tokenize(some_emoji, vqgan.encode, torch.device("cpu"), batch_size=7)
        for i in (0, 20, 59):
            picture = some_emoji[i]["image"][None].float() / 255
            plain = vqgan.encode(picture).flatten()
            mirrored = vqgan.encode(picture.flip(3)).flatten()
            assert torch.equal(cache.tokens[i, 0].long(), plain)
            expected = mirrored if some_emoji.may_mirror(i) else plain
            assert torch.equal(cache.tokens[i, 1].long(), expected)
    assert {some_emoji.may_mirror(i) for i in (0, 59)} == {True, False}
    assert cache.labels == some_emoji.labels


def test_cache_is_used_only_with_its_own_stamp(tmp_path):
    made = []

    def make():
        made.append(1)
        return TokenSet(torch.zeros(3, 2, 4).int(), torch.arange(3), torch.arange(3))

    path = tmp_path / "tokens.safetensors"
    for _ in range(2):
        cache = cached(path, {"tokenizer": "a"}, make)
        assert len(cache) == 3 and cache.labels == [0, 1, 2]
    assert len(made) == 1
    with pytest.raises(UserError, match="another tokenizer"):
        cached(path, {"tokenizer": "b"}, make)
    path.write_bytes(path.read_bytes()[:-5])
    assert len(cached(path, {"tokenizer": "a"}, make)) == 3 and len(made) == 2


def test_token_batches_resume_at_any_step_and_pass_over_every_image():
    grid = torch.arange(10)[:, None, None].expand(10, 2, 4).int()
    images = TokenSet(grid, torch.arange(10) % 2, torch.arange(10))
    stream = token_batches(images, 5, seed=3)
    whole = [next(stream) for _ in range(6)]
    for start in (1, 4):
        resumed = next(token_batches(images, 5, seed=3, start_step=start))
        assert all(torch.equal(resumed[k], whole[start][k]) for k in resumed)
    for epoch in range(3):
        seen = torch.cat([b["index"] for b in whole[2 * epoch : 2 * epoch + 2]])
        assert sorted(seen.tolist()) == list(range(10))
    fixed = list(fixed_batches(images, 3, most=5))
    assert torch.cat([b["index"] for b in fixed]).tolist() == [0, 2, 4, 6, 8]
