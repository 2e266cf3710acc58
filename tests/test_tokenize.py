"""`maskgit tokenize`, and training from what it makes: refusals, full disks, kills and signals."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, one_line
from pictures import config, make_folder
from runs import run, several
from tiny_tokenizer import save_tokenizer, shards

from maskgit.commands import main as entry
from maskgit.commands.main import main
from maskgit.common import UserError
from maskgit.engine.data import DataConfig, open_images
from maskgit.engine.tokenize import cached
from maskgit.engine.tokens import open_tokens
from maskgit.joins import maskgit_run
from maskgit.runs import MaskGITRun
from maskgit.tokenized import token_stamp
from vqgan import VQGAN


@pytest.fixture
def photos(tmp_path):
    """Thirty pictures in two classes."""
    return make_folder(tmp_path / "photos", ["left", "right"], 15)


@pytest.fixture
def command(photos, tokenizer_folder, tmp_path):
    """What makes a cache of `photos`, in small shards."""
    words = f"tokenize --data {photos} --tokenizer {tokenizer_folder} --out {tmp_path}/tokens"
    return f"{words} --size 16 16 --shard-images 6".split()


@pytest.fixture
def tokenized(command, tmp_path):
    """That cache."""
    assert main(command) == 0
    return tmp_path / "tokens"


def test_two_on_one_folder_are_one_too_many(command, tmp_path, capsys):
    holder = "import sys, time; from pathlib import Path; from maskgit.common.folder import locked"
    holder += "\nwith locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    words = [sys.executable, "-c", holder, tmp_path / "tokens"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert main(command) == 2
        assert f"in use by another process ({other.pid})" in capsys.readouterr().err
        other.kill()
    assert main(command) == 0


# Training from it.


def join(data, tokenizer, folder, **settings):
    """The task, stream and validation sets of a transformer's run."""
    run = MaskGITRun(tokenizer=str(tokenizer), data=config(data, **settings))
    run.model = replace(run.model, width=32, depth=1, heads=2)
    run.train.batch_size = 7
    run.train.device = "cpu"
    return maskgit_run(run, folder, print)


def test_a_cache_gives_the_batches_that_its_images_give(
    tokenized, photos, tokenizer_folder, tmp_path
):
    from_images = join(photos, tokenizer_folder, tmp_path / "run")
    from_tokens = join(tokenized, tokenizer_folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert sorted(p.name for p in (tmp_path / "run/tokens").iterdir()) == ["heldout", "train"]
    for start in (0, 5):
        streams = [joined[1](start) for joined in (from_images, from_tokens)]
        for _ in range(6):
            a, b = map(next, streams)
            assert a.keys() == b.keys() == {"tokens", "label", "index", "seed"}
            assert all(torch.equal(a[key], b[key]) for key in a)
    for name in ("train", "heldout"):
        a, b = (list(joined[2][name]()) for joined in (from_images, from_tokens))
        assert [x["tokens"].tolist() for x in a] == [x["tokens"].tolist() for x in b] != []
    one, other = (joined[0].parts["transformer"].config for joined in (from_images, from_tokens))
    assert one == other and one.grid == [4, 4] and one.num_classes == 2


def test_training_refuses_what_does_not_fit(tokenized, tokenizer_folder, tmp_path):
    other = save_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(UserError) as error:
        join(tokenized, other, tmp_path / "run")
    one_line(error, tokenizer_folder, f"tokenizer={other}", "sha256")
    with pytest.raises(UserError, match=r"give data\.mirror=true"):
        join(tokenized, tokenizer_folder, tmp_path / "run", mirror=False)
    with pytest.raises(UserError, match=r"give data\.no_mirror=\[\]"):
        join(tokenized, tokenizer_folder, tmp_path / "run", no_mirror=["left"])
    with pytest.raises(UserError, match="has no folder train"):
        join(tokenized / "train", tokenizer_folder, tmp_path / "run")
    shutil.rmtree(tokenized / "heldout")
    with pytest.raises(UserError, match="has no folder heldout"):
        join(tokenized, tokenizer_folder, tmp_path / "run")
    (tokenized / "train" / "index.json").unlink()
    with pytest.raises(UserError, match=r"tokens/train is no complete token cache"):
        join(tokenized, tokenizer_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_refuses_tokens_of_another_tokenizer_in_its_folder(
    photos, tokenizer_folder, tmp_path
):
    join(photos, tokenizer_folder, tmp_path / "run")
    other = save_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(UserError) as error:
        join(photos, other, tmp_path / "run")
    one_line(error, tmp_path / "run/tokens/train", tokenizer_folder, other)


# The command.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--size 18 16", "no multiple of 4 pixels"),
        ("--no-mirror lefd", "did you mean 'left'"),
        ("--dtype fp16", "take bf16 or fp32"),
        ("--data nowhere", "no data at nowhere"),
        ("--tokenizer nowhere", "no model at nowhere"),
        ("--heldout 0", "no held-out images"),
        ("--split test", "--split"),
        ("--crops -1", "--crops"),
    ],
)
def test_mistakes_are_one_line(options, message, photos, tokenizer_folder, tmp_path, capsys):
    command = f"tokenize --data {photos} --tokenizer {tokenizer_folder} --out {tmp_path}/t"
    assert main([*command.split(), "--size", "16", "16", *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_options_say_what_the_variants_are(photos, tokenizer_folder, tmp_path):
    command = f"tokenize --data {photos} --tokenizer {tokenizer_folder} --size 16 16 --heldout 0.5"
    for options, variants in (
        ("", 2),
        ("--no-mirror", 1),
        ("--no-mirror left right", 2),
        ("--no-mirror --crops 2", 3),
        ("--crops 2 --dtype bf16 --workers 1", 6),
    ):
        out = tmp_path / f"tokens{options}"
        assert main([*command.split(), *options.split(), "--out", str(out)]) == 0
        stamp, tokens = open_tokens(out / "train")
        assert stamp.variants == tokens.variants == variants
        rest = open_tokens(out / "heldout")[1]
        assert rest.variants == 1 and len(rest) + len(tokens) == 30


# What may happen on the way.


def test_a_full_disk_is_one_line_and_finished_shards_stay(
    tokenized, command, tmp_path, capsys, monkeypatch
):
    whole = shards(tokenized / "train")
    for name in list(whole)[1:3]:
        (tokenized / "train" / name).unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of it, half would be written
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    capsys.readouterr()
    try:
        status = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    path = tokenized / "train" / list(whole)[1]
    error = capsys.readouterr().err.splitlines()[-1]
    assert (status, error) == (1, f"maskgit: cannot write {path}: File too large")
    assert shards(tokenized / "train").items() < whole.items()
    assert not list((tokenized / "train").glob(".*"))
    assert main(command) == 0 and shards(tokenized / "train") == whole


def killed_at(size):
    """Hook: at byte `size` of any file the process is killed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 7, 500])
def test_a_kill_at_any_byte_leaves_nothing_that_looks_complete(size, tokenized, command, tmp_path):
    """In the lock (which names its process), in a shard's header, in its tokens, in the index."""
    folder = tokenized / "train"
    whole, index = shards(folder), (folder / "index.json").read_bytes()
    for target in (folder / list(whole)[2], folder / "index.json"):
        target.unlink()
        (folder / "index.json").unlink(missing_ok=True)
        status, _, err = run(tmp_path, command, partial(killed_at, size))
        assert status == -signal.SIGXFSZ, err
        left = [path.stat().st_size for path in folder.glob(f".{target.name}.*")]
        assert left == ([size] if size else [])
        assert shards(folder) == {k: v for k, v in whole.items() if k != target.name}
        assert not (folder / "index.json").exists()
        assert main(command) == 0
        assert shards(folder) == whole and (folder / "index.json").read_bytes() == index
        assert not list(folder.glob(".*"))


def tokenize_together(photos, tokenizer, folder, mood):
    """Hook: the command is to make the tokens of a run as its processes do."""

    def dispatch(arguments):
        dist.init_process_group("gloo")
        images = open_images(DataConfig(photos, size=[16, 16], heldout=0))
        vqgan = VQGAN.from_pretrained(tokenizer)

        def encode(pictures):
            assert dist.get_rank() == 0 or mood != "fails", "a bug"
            if dist.get_rank() == 1 and mood == "waits":
                time.sleep(600)
            return vqgan.encode(pictures)

        stamp = token_stamp(tokenizer, vqgan, images, shard_images=4)
        tokens = cached(folder, stamp, images, encode, torch.device("cpu"))
        print(tokens.take(list(range(len(tokens))), [1] * len(tokens))["tokens"].sum().item())

    entry.dispatch = dispatch


@pytest.mark.slow
@pytest.mark.parametrize("mood", ["works", "fails", "waits"])
def test_the_processes_of_a_run_make_its_tokens_together(mood, photos, tokenizer_folder, tmp_path):
    """A signal is heeded while they wait for each other, and one does not wait for a dead one."""
    folder = tmp_path / "tokens"
    hook = partial(tokenize_together, str(photos), str(tokenizer_folder), folder, mood)
    running = several(tmp_path, [], hooks={0: hook, 1: hook})
    if mood == "waits":
        while len(shards(folder)) < 4:  # all those of the first process
            assert all(started.lives for started in running)
            time.sleep(0.05)
        time.sleep(1)
        for started in running:
            started.send(signal.SIGTERM)
    statuses, printed, errors = zip(*(started.wait(300) for started in running), strict=True)
    if mood == "waits":
        assert statuses == (143, 143), errors
    elif mood == "fails":
        assert statuses == (1, 1) and "a bug" in errors[1]
        assert errors[0].splitlines()[-1].startswith(f"maskgit: a process that was making {folder}")
    else:
        assert statuses == (0, 0), errors
        assert printed[0] == printed[1]
        assert len(shards(folder)) == 8 and (folder / "index.json").exists()
