"""`maskgit train`: smoke runs, one's own pictures, resume by itself, and mistakes."""

import json
import re
import signal
import time

import pytest
import torch
from conftest import pictures
from runs import Started

from maskgit import MaskGIT, Pipeline, runs
from maskgit.commands.main import main
from maskgit.engine.config import parse_overrides
from vqgan import VQGAN

TINY = [
    "--smoke",
    "train.steps=4",
    "train.log_every=1",
    "train.validate_every=0",
    "train.draw_every=0",
    "data.size=[16, 16]",
]


@pytest.fixture
def own(tmp_path):
    """Sixty pictures of one's own, in two classes, one of them broken."""
    for i, (name, content) in enumerate(pictures(60)):
        file = tmp_path / "photos" / "ab"[i % 2] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "photos" / "a" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.fixture
def said(capsys):
    """`said(*arguments)` runs `maskgit train` here: its status, and what it printed."""

    def run(*arguments):
        status = main(["train", *map(str, arguments)])
        return status, "".join(capsys.readouterr())

    return run


def test_own_pictures_with_classes_then_flat_and_resume(own, said, tmp_path):
    tokenizer, run = tmp_path / "vq", tmp_path / "tr"
    common = [*TINY, f"data.path={own}", "data.max_broken=0.1"]
    shape = ["model.mult=[1, 2, 4]", "loss.quantize_from=1"]
    status, text = said("emoji_vqgan", *common, *shape, f"run={tokenizer}")
    assert status == 0 and "reached: loss" in text, text
    codes = VQGAN.from_pretrained(tokenizer / "export").quantizer.codebook
    warm = [f"run={tmp_path / 'warm_vq'}", f"init={tokenizer / 'export'}", "train.lr=1e-9"]
    status, text = said("emoji_vqgan", *common, *shape, *warm, "loss.decay=1", "loss.dead=0")
    assert status == 0, text
    kept = VQGAN.from_pretrained(tmp_path / "warm_vq" / "export").quantizer.codebook
    assert torch.allclose(codes, kept, atol=1e-4)
    assert VQGAN.from_pretrained(tokenizer / "export").config.factor == 4

    arguments = ["emoji_maskgit", *common, f"run={run}", f"tokenizer={tokenizer / 'export'}"]
    status, text = said(*arguments)
    assert status == 0 and "warning" not in text, text
    pipe = Pipeline.from_pretrained(run / "export", device="cpu")
    assert pipe.labels == ["a", "b"] and pipe.image_size == (16, 16)
    assert pipe.sample(["b"]).shape == (1, 3, 16, 16)

    status, text = said(*arguments)
    assert status == 0 and "nothing to do" in text
    (run / "export" / "model_index.json").unlink()  # as if a kill had come before it was written
    assert said(*arguments)[0] == 0 and (run / "export" / "model_index.json").exists()
    status, text = said(*arguments, "train.lr=0.5")
    assert status == 2 and "train.lr: 0.002, now 0.5" in text and "run=" in text
    status, text = said(*arguments, "train.steps=6")
    assert status == 0 and "resuming" in text
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]

    flat = own / "a"
    arguments = ["emoji_maskgit", *TINY, f"data.path={flat}", "data.max_broken=0.1"]
    arguments += [f"run={tmp_path / 'flat'}", f"tokenizer={tokenizer / 'export'}"]
    status, text = said(*arguments, "loss.label_dropout=0")
    assert status == 0, text
    assert MaskGIT.from_pretrained(tmp_path / "flat" / "export").config.num_classes == 0

    status, text = said(*arguments[:-2], f"run={tmp_path / 'warm'}", arguments[-1], "train.steps=1")
    assert status == 0, text
    status, text = said(
        *arguments[:-2], f"run={tmp_path / 'w2'}", arguments[-1], f"init={run}/export"
    )
    assert status == 0 and "of its 2 classes" in text, text  # and none here
    arguments += [f"init={run}/export", "model.width=32", f"run={tmp_path / 'w3'}"]
    status, text = said(*arguments)
    assert status == 2 and "do not fit" in text


def test_changed_data_with_the_bundled_tokenizer_is_warned_of(own, said, tmp_path):
    settings = [f"data.path={own}", "data.max_broken=0.1", "train.steps=1"]
    status, text = said("emoji_maskgit", *TINY, f"run={tmp_path / 'run'}", *settings)
    assert status == 0
    assert "warning: the bundled tokenizer was trained on emoji" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji_vqgna"], "did you mean 'emoji_vqgan'"),
        (["emoji_vqgan", "train.step=3"], "did you mean 'train.steps'"),
        (["emoji_vqgan", "train.steps=many"], "train.steps"),
        (["emoji_vqgan", "train.steps"], "key=value"),
        (["emoji_vqgan", "--smok"], "--smoke"),
        (["emoji_vqgan", "task=vqgam"], "did you mean 'vqgan'"),
        (["emoji_vqgan", "data.path=nowhere"], "no data at nowhere"),
        (["emoji_vqgan", "data.size=[60, 60]"], "no multiple of 8 pixels"),
        (["emoji_vqgan", "loss.perceptual=1", "loss.vgg=nowhere.pth"], "vgg16-397923af.pth"),
        (["emoji_vqgan", "train.device=cuda:9"], "no GPU"),
        (["emoji_vqgan", "train.dtype=fp16"], "take bf16 or fp32"),
        (["emoji_vqgan", "train.batch_size=0"], "train.batch_size=0 must be above 0"),
        (["emoji_vqgan", "train.betas=[0.9]"], "train.betas=[0.9]"),
        (["emoji_vqgan", "train.seed=-1"], "train.seed=-1"),
        (["emoji_vqgan", "model.channels=20"], "groups=8 must divide"),
        (["emoji_vqgan", "model.mult=[]"], "groups=8 must divide"),
        (["emoji_vqgan", "model.attention=[4]"], "levels are 0 to 3"),
        (["emoji_vqgan", "loss.quantize_from=5000"], "set it lower"),
        (["emoji_vqgan", "init=nowhere"], "no model at nowhere"),
        (["emoji_vqgan", "loss.decoder_only=true"], "give init=FOLDER"),
        (["emoji_maskgit", "size=huge"], "unknown size 'huge'"),
        (["emoji_maskgit", "loss.schedule=cosin"], "did you mean 'cosine'"),
        (["emoji_maskgit", "tokenizer=nowhere"], "no model at nowhere"),
        (["emoji_maskgit", "model.codebook_size=7"], "follow from tokenizer"),
        (["emoji_maskgit", "model.grid=[4, 4]"], "follow from tokenizer"),
        (["emoji_maskgit", "sampling.guidence=3"], "did you mean 'guidance'"),
        (["emoji_maskgit", "model.depth=0"], "depth=0"),
        (["emoji_classifier", "model.num_classes=7"], "follow from tokenizer"),
        (["emoji_classifier", "model.widths=[12]"], "groups=8 must divide"),
        (["emoji_classifier", "loss.label_smoothing=1"], "label_smoothing=1"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, said, tmp_path):
    status, text = said(*arguments, f"run={tmp_path / 'run'}")
    assert status == 2
    (line,) = [line for line in text.splitlines() if line.startswith("maskgit:")]
    assert message in line
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_a_size_sets_the_model_and_later_settings_win():
    content = {"task": "maskgit", "size": "halton-base", "model": {"depth": 3}}
    for words, shape in (
        ([], (768, 3, 12)),
        (["size=tiny"], (64, 2, 4)),
        (["size=tiny", "model.heads=2"], (64, 2, 2)),
    ):
        model = runs.resolve(dict(content), parse_overrides(words), smoke=False)[0].model
        assert (model.width, model.depth, model.heads) == shape


def test_empty_folder_and_unwritable_run(said, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    status, text = said("emoji_vqgan", f"data.path={tmp_path / 'empty'}", f"run={tmp_path / 'r'}")
    assert status == 2 and "no image" in text
    status, text = said("emoji_vqgan", f"run={tmp_path / 'file' / 'run'}")
    assert status == 2 and "cannot write" in text


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sharper_decoder_leaves_every_token_as_it_was(compiled, own, said, tmp_path):
    common = [*TINY, f"data.path={own}", "data.max_broken=0.1", "model.mult=[1, 2, 4]"]
    first, second = tmp_path / "first", tmp_path / "second"
    status, text = said("emoji_vqgan", *common, "loss.quantize_from=1", f"run={first}")
    assert status == 0, text
    gan = [
        "loss.adversarial=0.5",
        "loss.generator_from=1",
        "loss.ramp=0",
        f"train.compile={compiled}",
    ]
    start = [f"init={first / 'export'}", "loss.decoder_only=true", f"run={second}"]
    status, text = said("emoji_vqgan", *common, *start, *gan)
    assert status == 0, text
    before, after = (VQGAN.from_pretrained(run / "export") for run in (first, second))
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = before.encode(images)
    assert torch.equal(tokens, after.encode(images))
    assert not torch.allclose(before.decode(tokens), after.decode(tokens), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["emoji_vqgan", "emoji_decoder", "emoji_maskgit", "emoji_classifier", "emoji_clip"]
)
def test_smoke_run_reaches_the_loss_that_it_announces(name, forked, tmp_path):
    done = forked("train", name, "--smoke", f"run={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    expected = float(re.search(r"^expect: a loss of about ([\d.]+)", done.stdout, re.M)[1])
    reached = float(re.search(r"^reached: loss ([\d.]+)", done.stdout, re.M)[1])
    assert reached == pytest.approx(expected, rel=0.03)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(number, status, forked, tmp_path):
    run = tmp_path / "run"
    words = ["train", "emoji_vqgan", "--smoke", f"run={run}"]
    started = Started(tmp_path, [*words, "train.steps=100000", "train.save_every=0"])
    while not (run / "metrics.jsonl").exists():
        assert started.lives
        time.sleep(0.1)
    started.send(number)
    ended, output, _ = started.wait()
    assert ended == status
    step = int(re.search(r"saved at step (\d+)", output)[1])
    done = forked(*words, f"train.steps={step + 2}")
    assert done.returncode == 0, done.stderr
    assert f"at step {step}" in done.stdout
