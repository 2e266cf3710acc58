"""`maskgit train --dry-run`: what it tells is so, and it leaves nothing behind."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT, execute, one_line, pictures
from omegaconf import OmegaConf

from maskgit import MaskGIT, joins
from maskgit.commands.main import main
from maskgit.common import UserError
from maskgit.dry_run import done, dry_run, late_steps, short, size, span
from maskgit.engine.config import parse_overrides
from maskgit.runs import resolve
from vqgan import VQGAN

VQGAN_TINY = {
    "task": "vqgan",
    "data": {"size": [16, 16]},
    "model": {"channels": 8, "mult": [1, 2], "z_channels": 8, "groups": 4,
              "encoder_blocks": 1, "decoder_blocks": 1,
              "quantizer": {"codebook_size": 16, "dim": 8}},
    "discriminator": {"channels": 8},
    "loss": {"quantize_from": 0},
    "train": {"steps": 6, "batch_size": 4, "device": "cpu", "dtype": "fp32", "save_every": 2,
              "draw_every": 0, "validate_every": 0, "log_every": 2},
}  # fmt: skip
MASKGIT_TINY = {
    "task": "maskgit",
    "size": "tiny",
    "data": {"size": [32, 32]},
    "train": {"steps": 6, "batch_size": 4, "device": "cpu", "dtype": "fp32"},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty pictures in two classes."""
    folder = tmp_path_factory.mktemp("photos")
    for i, (name, content) in enumerate(pictures(40)):
        path = folder / "ab"[i % 2] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def described(tmp_path, photos):
    """`described(content, *settings)` is a run of these pictures that begins in `tmp_path`."""

    def make(content, *settings):
        given = (f"data.path={photos}", f"run={tmp_path / 'run'}", *settings)
        return resolve(json.loads(json.dumps(content)), parse_overrides(given), False)[0]

    return make


def told(run):
    """What a dry run says, by name, and what else."""
    lines = []
    assert dry_run(run, lines.append) is None
    pairs = [re.fullmatch(r"(.{10,40}?)  +(\S.*)", line) for line in lines]
    table = {pair[1].strip(): pair[2] for pair in pairs if pair}
    return table, [line for line, pair in zip(lines, pairs, strict=True) if not pair]


def bytes_of(text):
    """The first number of bytes in a text."""
    number, unit = re.search(r"([\d.e+]+) (MB|GB)", text).groups()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


def test_everything_is_told_and_nothing_written(described, tmp_path, photos):
    before = sorted(photos.rglob("*"))
    run = described(VQGAN_TINY, "loss.adversarial=0.1", "loss.generator_from=0")
    table, rest = told(run)
    assert not rest
    parts = {
        name: int(text) if text.isdigit() else text
        for name, text in table.items()
        if name.startswith("parameters of ")
    }
    assert list(parts) == ["parameters of generator", "parameters of discriminator"]
    still = VQGAN(run.model).quantizer.codebook.numel()  # follows its latents, by no gradient
    count = sum(p.numel() for p in VQGAN(run.model).parameters())
    assert (
        parts["parameters of generator"]
        == f"{short(count)}, {short(count - still)} of them trained"
    )
    assert table["FLOPs a step"].endswith("forward and backward, 4 images")
    assert 5e7 < bytes_of(table["peak memory"]) < 2e10 and "resident" in table["peak memory"]
    assert float(table["images/s"]) > 0
    assert table["time to the end"].endswith("for 6 steps, without validation")
    assert str(tmp_path / "run") in table["disk free"] and bytes_of(table["disk free"]) > 0
    assert not (tmp_path / "run").exists() and sorted(photos.rglob("*")) == before


def test_flops_are_those_of_the_matrix_products(described):
    run = described(MASKGIT_TINY, "model.architecture=official", "model.ffn=96")
    table, _ = told(run)
    model = run.model  # with what follows from tokenizer and data filled in
    n, d, b = model.tokens, model.width, run.train.batch_size
    row = n + 1  # the class has a place of its own
    block = row * (4 * d * d + 2 * d * model.ffn) + 2 * row * row * d
    head = n * (d * d + d * model.codebook_size)
    # Each product once forward, twice backward: for its input and for its weights.
    assert table["FLOPs a step"].startswith(f"{short(2 * 3 * b * (model.depth * block + head))},")


def flops(run):
    return told(run)[0]["FLOPs a step"]


def test_the_phase_that_is_tried_is_the_one_where_everything_is_on(described):
    gan = ("loss.adversarial=0.1", "loss.feature_matching=1", "loss.entropy=0.1")
    late = ("loss.discriminator_from=2", "loss.generator_from=3", "loss.ramp=2")
    at_once = ("loss.discriminator_from=0", "loss.generator_from=0", "loss.ramp=0")
    warm = described(VQGAN_TINY, *gan, *late, "loss.quantize_from=2")
    assert (
        flops(warm) == flops(described(VQGAN_TINY, *gan, *at_once)) != flops(described(VQGAN_TINY))
    )
    assert late_steps(warm) == range(4, 6)
    # The step that makes the codebook of what the steps before it collected cannot be tried.
    assert late_steps(described(VQGAN_TINY, "loss.quantize_from=5")) == range(6, 8)
    assert told(described(VQGAN_TINY, "loss.quantize_from=5", "train.batch_size=8"))[0]


def test_a_penalty_of_some_steps_is_tried_and_not_measured(described):
    gan = ("loss.adversarial=0.1", "loss.discriminator_from=1", "loss.generator_from=1")
    lazy = described(VQGAN_TINY, *gan, "loss.r1=10", "loss.r1_every=4")
    steps = late_steps(lazy)
    assert len(steps) == 3 and [(step - 1) % 4 for step in steps] == [0, 1, 2] and steps[0] >= 4
    plain = flops(described(VQGAN_TINY, *gan))
    assert flops(lazy) == plain
    always = described(VQGAN_TINY, *gan, "loss.r1=10", "loss.r1_every=1")
    assert len(late_steps(always)) == 2 and flops(always) != plain


def test_disk_needed_is_what_a_run_writes(described, tmp_path):
    settings = ("loss.adversarial=0.1", "loss.generator_from=0", "model.channels=32")
    table, _ = told(described(VQGAN_TINY, *settings))
    joins.start(described(VQGAN_TINY, *settings), say=lambda line: None)
    folder = tmp_path / "run"
    kept = list((folder / "checkpoints").glob("step_*"))
    assert len(kept) == 2 and f"{len(kept)} checkpoints of " in table["disk needed"]
    files = [f for f in folder.rglob("*.safetensors") if f.is_file()]
    written = sum(f.stat().st_size for f in files)
    once = sum(f.stat().st_size for f in files if f.is_relative_to(kept[0]))
    assert bytes_of(table["disk needed"]) == pytest.approx(written + once, rel=0.02)
    # Now that it has run, nothing is left to be done, and another config does not go with it.
    table, _ = told(described(VQGAN_TINY, *settings))
    assert done(folder) == 6 and table["time to the end"] == "0:00 for 0 steps, without validation"
    assert (
        " for 4 steps"
        in told(described(VQGAN_TINY, *settings, "train.steps=10"))[0]["time to the end"]
    )
    with pytest.raises(UserError) as error:
        dry_run(described(VQGAN_TINY, *settings, "train.lr=0.5"))
    one_line(error, "another config", "train.lr")


def test_tokens_that_are_not_there_are_told_of_and_made_of_a_few_images(
    described, tmp_path, photos, capsys
):
    table, rest = told(described(MASKGIT_TINY))
    told_of = [line for line in rest if "maskgit tokenize" in line]
    assert len(told_of) == 1 and "encoding 40 images" in told_of[0]
    # 36 training images, as they are and mirrored, and 4 held-out ones; 16 codes of 2 bytes each.
    heldout = int(re.search(r"(\d+)/\1 ", capsys.readouterr().err.splitlines()[-1])[1])
    assert bytes_of(told_of[0]) == ((40 - heldout) * 2 + heldout) * 16 * 2
    assert table["disk needed"].endswith("one being written, the export, the tokens")
    assert not (tmp_path / "run").exists()

    out = tmp_path / "tokens"
    command = ["tokenize", "--data", photos, "--tokenizer", "emoji", "--size", 32, 32, "--out", out]
    assert main([*map(str, command), "--device", "cpu"]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again, rest = told(described(MASKGIT_TINY, f"data.path={out}"))
    assert not [line for line in rest if "maskgit tokenize" in line]
    assert again["FLOPs a step"] == table["FLOPs a step"]
    assert again["disk needed"].endswith("one being written, the export")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["data.path=nowhere"], ["no data at nowhere"]),
        (["loss.perceptual=1", "loss.vgg=nowhere.pth"], ["nowhere.pth", "vgg16-397923af.pth"]),
        (["init=nowhere"], ["no model at nowhere"]),
        (["train.device=cuda:9"], ["no GPU"]),
        ([f"run={__file__}/run"], ["cannot write to run=", "is no folder"]),
        (["data.size=[15, 15]"], ["no multiple of 2"]),
        (["train.batch_size=4", "train.micro_batch=3"], ["train.micro_batch=3"]),
    ],
)
def test_what_would_stop_a_run_stops_it(described, settings, parts):
    with pytest.raises(UserError) as error:
        dry_run(described(VQGAN_TINY, *settings))
    one_line(error, *parts)


def test_pictures_that_cannot_be_read_stop_it(described, tmp_path):
    for i in range(20):
        path = tmp_path / "broken" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        dry_run(described(VQGAN_TINY, f"data.path={tmp_path / 'broken'}"))
    one_line(error, "broken")


def test_too_little_disk_is_warned_of(described, monkeypatch):
    monkeypatch.setattr("maskgit.dry_run.free_space", lambda folder: 1000)
    _, rest = told(described(VQGAN_TINY))
    assert len(rest) == 1 and rest[0].startswith("warning: ") and "0.001 MB are free" in rest[0]


@pytest.mark.slow
def test_the_command_in_two_processes_tells_once(tmp_path, photos):
    config = tmp_path / "tiny.yaml"
    OmegaConf.save(OmegaConf.create({**VQGAN_TINY, "run": str(tmp_path / "run")}), config)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command = ["-m", "maskgit", "train", config, "--dry-run", f"data.path={photos}"]
    together = execute(sys.executable, *launch, *command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    alone = execute(sys.executable, *command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert together.returncode == alone.returncode == 0, together.stderr + alone.stderr
    assert "each of 2 processes" in together.stdout and "processes" not in alone.stdout
    counted = [re.findall("FLOPs a step .*", done.stdout) for done in (together, alone)]
    assert counted[0] == counted[1] and len(counted[0]) == 1
    assert not (tmp_path / "run").exists()


def test_numbers_are_short():
    assert [short(n) for n in (0, 999, 1000, 54_512_345, 1.2345e12, 3e15)] == [
        "0", "999", "1 k", "54.51 M", "1.234 T", "3 P"
    ]  # fmt: skip
    assert [size(n) for n in (0, 1_500, 80_700_000, 2_345_000_000)] == [
        "0 MB", "0.0015 MB", "80.7 MB", "2.35 GB"
    ]  # fmt: skip
    assert [span(s) for s in (59, 3600, 172_800, 864_000)] == [
        "0:59",
        "1:00:00",
        "48:00:00",
        "10.0 days",
    ]


def test_parameters_are_those_of_the_model_that_tokenizer_and_data_ask_for(described):
    run = described(MASKGIT_TINY)
    table, _ = told(run)
    with torch.device("meta"):
        count = sum(p.numel() for p in MaskGIT(run.model).parameters())
    assert run.model.num_classes == 2 and table["parameters of transformer"] == short(count)
