"""Training of CLIP: what a step does, what stays locked, what is logged, and the command."""

import json
import math

import pytest
import torch
from conftest import ROOT, first_loss, one_line, pictures
from omegaconf import OmegaConf
from test_clip_losses import gradients, micro, tiny, tiny_batch

from clip import CLIP
from clip.task import CLIPLossConfig, CLIPTask
from maskgit.commands.main import main
from maskgit.common import UserError
from maskgit.engine.config import read_yaml
from maskgit.runs import resolve

STILL = CLIPLossConfig(varied=False)


def test_the_scale_is_brought_back_into_its_bounds():
    model = tiny().float()
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    updates = CLIPTask(model, STILL, []).step([tiny_batch()], 0)
    next(updates)
    assert model.logit_scale.item() == 7.0  # the update is made with what it was
    assert next(updates, None) is None
    assert model.logit_scale.exp().item() == pytest.approx(100.0)
    model.config.max_scale = None
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    list(CLIPTask(model, STILL, []).step([tiny_batch()], 0))
    assert model.logit_scale.item() == 7.0


def test_what_is_logged():
    _, loss, _, logs = first_loss(CLIPTask(tiny(), STILL, []), tiny_batch())
    assert logs["loss"] == loss
    assert logs["loss_above_chance"].item() == pytest.approx(loss.item() - math.log(6))
    assert logs["scale"].item() == pytest.approx(1 / 0.07)
    assert 0 <= logs["top1"] <= 1
    *_, logs = first_loss(CLIPTask(tiny("sigmoid"), STILL, []), tiny_batch())
    assert logs["bias"].item() == -10.0 and "loss_above_chance" not in logs


def test_a_loss_that_stays_near_chance_is_told_once():
    task = CLIPTask(tiny(), STILL, [])
    told = [
        w for step in range(0, 2000, 50) for w in task.watch(step, {"loss_above_chance": -0.01})
    ]
    assert len(told) == 1 and "ln(pairs)" in told[0]
    learning = CLIPTask(tiny(), STILL, []).watch
    assert not [
        w for step in range(0, 2000, 50) for w in learning(step, {"loss_above_chance": -1.0})
    ]


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("size", [6, 2])
def test_a_locked_tower_is_run_once_and_never_changed(side, size):
    config = CLIPLossConfig(locked=side, varied=False)
    model = tiny()
    task = CLIPTask(model, config, [])
    tower, other = (model.visual, model.text) if side == "image" else (model.text, model.visual)
    runs = []
    tower.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(2):
        _, loss, *_ = first_loss(task, *micro(tiny_batch(), size))
        loss.backward()
    assert len(runs) == len(task.kept)  # alone each, and once
    assert all(p.grad is None for p in tower.parameters())
    assert all(p.grad is not None for p in other.parameters())
    assert len(task.kept) == len({"image": range(6), "text": {5, 6, 7, 8, 9}}[side])


def test_locked_features_are_those_of_the_tower():
    model = tiny()
    task = CLIPTask(model.train(), CLIPLossConfig(locked="text", varied=False), [])
    _, text = task.features(model, tiny_batch())
    again = task.features(model, tiny_batch())[1]
    assert torch.equal(text, again)
    expected = model.eval().encode_text(tiny_batch()["text"][1:3])
    assert torch.allclose(text[1:3], expected)


@pytest.mark.parametrize("side", ["image", "text"])
def test_what_is_kept_of_training_plays_no_part_in_validation(side):
    """Another set has the same numbers for other images."""
    model = tiny()
    task = CLIPTask(model.train(), CLIPLossConfig(locked=side, varied=False), [])
    task.features(model, tiny_batch())
    other = tiny_batch()
    other["image"], other["text"] = other["image"].flip(0), other["text"].flip(0)
    model.eval()
    fresh = CLIPTask(model, STILL, []).validate(model, [other])
    assert task.validate(model, [other]) == fresh


@pytest.mark.parametrize(
    "settings, parts",
    [
        (dict(positives="both"), ["loss.positives", "pair"]),
        (dict(locked="towers"), ["loss.locked", "image"]),
        (dict(locked="image"), ["loss.varied=false"]),
        (dict(weight=1.5), ["loss.weight=1.5"]),
        (dict(smoothing=1.0), ["loss.smoothing=1.0"]),
    ],
)
def test_bad_settings_are_refused(settings, parts):
    with pytest.raises(UserError) as error:
        CLIPLossConfig(**settings)
    one_line(error, *parts)


def test_settings_that_the_loss_cannot_have():
    for settings in (dict(weight=0.7), dict(smoothing=0.1)):
        with pytest.raises(UserError) as error:
            CLIPTask(tiny("sigmoid"), CLIPLossConfig(**settings), [])
        one_line(error, "InfoNCE", "sigmoid")
    with pytest.raises(UserError) as error:
        CLIPTask(tiny(), CLIPLossConfig(positives="class"), [])
    one_line(error, "classes")


def test_one_direction_alone_moves_less():
    both = gradients(tiny().eval(), STILL, tiny_batch())
    one = gradients(tiny().eval(), CLIPLossConfig(weight=1.0, varied=False), tiny_batch())
    assert not torch.equal(both["logit_scale"], one["logit_scale"])


def test_validation_ranks_the_whole_set():
    model = tiny().eval()
    batches = [tiny_batch(4), {k: v[4:] for k, v in tiny_batch().items()}]
    scores = CLIPTask(model, STILL, []).validate(model, batches)
    assert set(scores) == {"loss", "image_to_text@10", "text_to_image@10"}
    assert scores["image_to_text@10"] == 1.0  # of six
    with pytest.raises(UserError) as error:
        CLIPTask(model, STILL, []).validate(model, [])
    one_line(error, "no image to validate on")


def test_the_drawing_shows_each_image_and_what_fits_its_text():
    model = tiny().eval()
    sheet = CLIPTask(model, STILL, []).draw(model, tiny_batch())
    assert sheet.shape[0] == 3 and sheet.min() >= 0 and sheet.max() <= 1
    first = sheet[:, 2:18, 2:18]
    assert torch.allclose(first, tiny_batch()["image"][0] / 255)


def folder_of_pairs(path, caption=lambda i: f"drawing {i}"):
    for i, (_, content) in enumerate(pictures(12)):
        (path / f"{i}.png").write_bytes(content)
        (path / f"{i}.txt").write_text(caption(i))
    return path


TINY = """
task: clip
data: {size: [16, 16], heldout: 0.3, mirror: false}
model:
  embed: 16
  image: {size: [16, 16], patch: 8, width: 16, depth: 1, heads: 2}
  text: {merges: 100, context: 12, width: 16, depth: 1, heads: 2}
train: {steps: 4, batch_size: 4, lr: 1.0e-3, warmup: 1, save_every: 2, log_every: 1, dtype: fp32}
"""


@pytest.fixture
def train(tmp_path, capsys, monkeypatch):
    """`train(*settings)` trains the tiny CLIP on a folder of pairs: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "pairs").mkdir()
    folder_of_pairs(tmp_path / "pairs")

    def run(*settings):
        status = main(["train", "tiny.yaml", "data.path=pairs", "run=run", *settings])
        return status, *capsys.readouterr()

    return run


def test_a_folder_of_pairs_trains_and_loads(train, tmp_path):
    status, out, _ = train("train.micro_batch=2", "loss.positives=caption")
    assert status == 0 and out.splitlines()[-1] == "run/export"
    model = CLIP.from_pretrained(tmp_path / "run" / "export")
    assert not model.training and model.config.text.merges == 100
    assert (tmp_path / "run" / "export" / "clip" / "config.json").is_file()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines]
    assert any("heldout/image_to_text@10" in line for line in last)
    assert any("loss_above_chance" in line for line in last)


def test_going_on_is_exact(train, tmp_path):
    train()
    whole = CLIP.from_pretrained("run/export").state_dict()
    train("run=other", "train.steps=2", "train.final_lr=1.0", "train.warmup=0")
    train("run=again", "train.final_lr=1.0", "train.warmup=0")
    status, *_ = train("run=other", "train.final_lr=1.0", "train.warmup=0")
    assert status == 0
    parts = CLIP.from_pretrained("other/export").state_dict()
    together = CLIP.from_pretrained("again/export").state_dict()
    assert all(torch.equal(parts[name], together[name]) for name in together)
    assert not all(torch.equal(whole[name], together[name]) for name in whole)


def test_a_table_of_all_captions_serves_both_splits(train, tmp_path):
    rows = "".join(f"{i}.png,drawing {i}\n" for i in range(12))
    (tmp_path / "t.csv").write_text("image,caption\n" + rows)
    for file in (tmp_path / "pairs").glob("*.txt"):
        file.unlink()
    status, out, err = train("captions=t.csv")
    assert status == 0, err
    assert "different captions, 0 of them cut" in out
    (tmp_path / "pairs" / "t.csv").write_text("image,caption\n")
    status, _, err = train("captions=pairs/t.csv", "run=other")
    assert status == 2 and "lies among the images" in err


def test_captions_that_are_cut_are_counted(train, tmp_path):
    (tmp_path / "pairs" / "3.txt").write_text("a very long caption " * 9)
    _, out, _ = train("data.heldout=0.1")
    assert "1 of them cut" in out


@pytest.mark.parametrize("side", ["image", "text"])
def test_going_on_with_a_locked_tower_is_exact(train, side):
    train()
    locked = [f"loss.locked={side}", "loss.varied=false", "init=run/export", "train.final_lr=1.0"]
    locked += ["train.warmup=0", "train.micro_batch=2"]
    status, _, err = train("run=whole", *locked)
    assert status == 0, err
    train("run=parts", "train.steps=2", *locked)
    train("run=parts", *locked)
    whole, parts = (
        CLIP.from_pretrained(f"{run}/export").state_dict() for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    start = CLIP.from_pretrained("run/export").state_dict()
    tower = {"image": "visual.", "text": "text."}[side]
    same = {name for name in whole if torch.equal(whole[name], start[name])}
    assert {name for name in whole if name.startswith(tower)} <= same
    assert "logit_scale" not in same


def test_what_a_run_may_start_from(train):
    train()
    status, _, err = train("run=free", "init=run/export", "model.image.patch_dropout=0.5")
    assert status == 0, err
    large = ["data.size=[24,24]", "model.image.size=[24,24]", "train.steps=1", "train.warmup=1"]
    status, _, err = train("run=large", "init=run/export", *large, "train.lr=1.0e-9")
    assert status == 0, err
    found = CLIP.from_pretrained("large/export").visual.positional_embedding
    expected = CLIP.from_pretrained("run/export").visual.positions((3, 3))
    assert torch.allclose(found, expected, atol=1e-6)
    status, _, err = train("run=other", "init=run/export", "model.image.activation=quick_gelu")
    assert status == 2 and "do not fit" in err and "activation" in err


def test_the_loss_is_fp32_under_autocast():
    model, batch = tiny().float(), tiny_batch()
    task = CLIPTask(model, STILL, [])
    image, text = (torch.nn.functional.normalize(torch.randn(6, 16), dim=1) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = task.loss(model, image, text, batch)
    assert torch.equal(inside, task.loss(model, image, text, batch))


@pytest.mark.parametrize(
    "settings, parts",
    [
        (["train.batch_size=1"], ["batch_size=1", "2 or more"]),
        (["captions=nowhere.csv"], ["nowhere.csv"]),
        (["loss.positives=class"], ["classes"]),
        (["loss.locked=text"], ["init=FOLDER"]),
        (["model.image.heads=3"], ["image.heads=3", "16"]),
        (["model.image.pool=mean", "model.image.patch=7"], ["patch=7", "[16, 16]"]),
        (["model.text.merges=60000"], ["60000", "48894"]),
        (["model.text.merges=null", "model.text.vocabulary=900"], ["another tokenizer"]),
        (["model.loss=sigmoid", "loss.smoothing=0.1"], ["InfoNCE"]),
        (["model.image.tower=swin"], ["image tower", "vit"]),
        (["model.image.with=3"], ["with", "width"]),
        (["model.max_scale=0.5"], ["max_scale=0.5"]),
        (["model.embed=0"], ["embed=0"]),
        (["data.size=[32,16]"], ["data.size=[32, 16]", "[16, 16]"]),
        (
            ["loss.locked=image", "loss.varied=false", "init=run", "data.mirror=true"],
            ["run"],
        ),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(train, tmp_path, settings, parts):
    status, _, err = train(*settings)
    assert status == 2 and len(err.splitlines()) == 1
    assert all(part in err for part in parts), err
    assert not (tmp_path / "run").exists()


def test_a_caption_that_is_missing(train, tmp_path):
    (tmp_path / "pairs" / "7.txt").unlink()
    status, _, err = train()
    assert status == 2 and "7.png" in err and len(err.splitlines()) == 1


def test_a_loss_that_is_not_finite_stops_the_run(train):
    status, _, err = train("model.image.eps=.nan")
    assert status == 2 and "not finite at step 0" in err and "samples" in err


def published():
    return sorted((ROOT / "configs" / "published").glob("*clip*.yaml"))


@pytest.mark.parametrize("path", published(), ids=lambda path: path.stem)
def test_published_configs_say_what_they_are(path):
    header = path.read_text().partition("\ntask:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("Source:", "Reached:", "Hardware:", f"maskgit train published/{path.stem} "):
        assert word in header
    run, _ = resolve(read_yaml(str(path), []), OmegaConf.create(), smoke=False)
    with torch.device("meta"):
        model = CLIP(run.model)
    assert list(run.data.size) == run.model.image.size
    count = sum(p.numel() for p in model.parameters())
    if path.stem == "clip_vit_b32":
        assert count == 151_277_313  # of the released weights
        assert len([*model.parameters()]) == 302
