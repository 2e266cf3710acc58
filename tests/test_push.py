"""`maskgit push`: what goes to the hub, what stays, what the card says, and what is refused."""

import re
import shutil
import sys

import huggingface_hub.constants
import pytest
from conftest import ROOT, execute, one_line
from hub_server import TOKEN, Repository, serving
from huggingface_hub import HfApi
from test_hub import FIND, NOWHERE, contents, save_pipeline

from maskgit import card
from maskgit.commands import push
from maskgit.commands.main import Parser
from maskgit.common import RunError, UserError

NAME = "user/mine"
PUSH = ("-m", "maskgit", "push", "model", NAME, "--license", "mit")


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture
def elsewhere(hub, tmp_path):
    """`elsewhere(*arguments)` runs Python in a folder, with a home and a hub of its own."""

    def run(*arguments, **environment):
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        settings |= {"PYTHONPATH": str(ROOT), **environment}
        return execute(sys.executable, *arguments, cwd=tmp_path, **settings)

    return run


@pytest.fixture
def model(tmp_path):
    """A tiny pipeline with a CLIP, and things in its folder that are no part of it."""
    folder = save_pipeline(tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    (folder / "samples").mkdir()
    (folder / "samples" / "config.json").write_text("{}")
    (folder / "vqgan" / "optimizer.safetensors").write_bytes(b"large")
    return folder


PARTS = [f"{kind}/{file}" for kind in ("clip", "transformer", "vqgan") for file in card.OF_PARTS]
OWN = ["labels.json", "model_index.json", "presets.json", *PARTS]


def dry(folder, *more):
    """What a dry run prints, in this process."""
    parser = Parser("maskgit push", push.EXAMPLE, push.HELP)
    push.add_arguments(parser)
    push.run(parser.parse_intermixed_args([str(folder), NAME, "--dry-run", *map(str, more)]))


def announced(printed):
    """Sizes of the files that are announced, by name."""
    lines = re.findall(r"^ *([\d,]+)  (\S+)$", printed, re.MULTILINE)
    return {name: int(size.replace(",", "")) for size, name in lines}


# ---------------------------------------------------------------- to the hub and back


@pytest.mark.slow
def test_what_goes_is_what_a_dry_run_announces_and_it_loads(elsewhere, hub, model, tmp_path):
    before = contents(model)
    told = elsewhere(*PUSH, "--dry-run", HF_ENDPOINT=NOWHERE)
    assert told.returncode == 0, told.stderr
    assert "nothing was sent" in told.stdout and hub.requests == []
    strays = "not sent, no part of the model: notes.txt, samples/, vqgan/optimizer.safetensors"
    assert strays in told.stdout
    done = elsewhere(*PUSH)
    assert done.returncode == 0, done.stderr
    assert contents(model) == before
    assert "\r" not in done.stderr and "\x1b" not in done.stderr

    repo = hub.repos[NAME]
    assert repo.messages == ["initial commit", "maskgit push"] and not repo.private
    assert done.stdout.splitlines()[-1] == f"{hub.url}/{NAME}/commit/{repo.refs['main']}"
    files = repo.files()
    assert sorted(files) == sorted(["README.md", "samples.png", *OWN])
    assert {name: files[name] for name in OWN} == {name: before[name] for name in OWN}
    sizes = {name: len(content) for name, content in files.items()}
    assert announced(told.stdout) == announced(done.stdout) == sizes
    assert files["README.md"].decode() in told.stdout

    assert contents(elsewhere("-c", FIND, NAME).stdout.strip()) == {
        name: content for name, content in files.items() if name.endswith(("json", "tensors"))
    }


def test_what_an_older_push_had_more_goes(hub, model, capsys):
    """It would be loaded with the rest; what somebody else put there stays."""
    api = HfApi(hub.url, TOKEN)
    files = {name: model / name for name in OWN} | {"README.md": b"a card", "samples.png": b"png"}
    push.send(api, "user/older", files, private=False)
    repo = hub.repos["user/older"]
    repo.commit({"mine.txt": b"put there by hand"}, "by hand")
    for name in (gone := ["clip/config.json", "clip/model.safetensors", "presets.json"]):
        del files[name]
    del files["samples.png"]
    url = push.send(api, "user/older", files, private=False)
    assert url.endswith(f"/user/older/commit/{repo.refs['main']}")
    assert set(repo.files()) == {"mine.txt", *files}
    printed = capsys.readouterr().out
    assert {line.split()[-1] for line in printed.splitlines()} == {*gone, "samples.png"}
    push.send(api, "user/older", files, private=False)
    assert set(repo.files()) == {"mine.txt", *files}


def test_private_is_private(hub):
    api, files = HfApi(hub.url, TOKEN), {"README.md": b"a card"}
    push.send(api, "user/hidden", files, private=True)
    push.send(api, "user/hidden", files, private=True)
    assert hub.repos["user/hidden"].private
    hub.repos["user/open"] = Repository()
    with pytest.raises(UserError) as error:
        push.send(api, "user/open", files, private=True)
    one_line(error, "user/open is public already")
    assert hub.repos["user/open"].files() == {}


@pytest.mark.parametrize(
    ("name", "token", "status", "part"),
    [
        (NAME, "hf_wrong", 2, "does not let this account write user/mine"),
        ("other/mine", TOKEN, 2, "does not let this account write other/mine"),
        (NAME, None, 1, "user/mine was not sent ("),
    ],
)
def test_what_the_hub_refuses(hub, name, token, status, part):
    api = HfApi(hub.url, token) if token else HfApi(NOWHERE, TOKEN)
    with pytest.raises(UserError, match=re.escape(part)) as error:
        push.send(api, name, {"README.md": b"a card"}, private=False)
    one_line(error, name)
    assert error.value.status == status


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError) as error:
        push.send(HfApi(hub.url, TOKEN), NAME, {"README.md": b"a card"}, private=False)
    one_line(error, "was not sent", "offline")


@pytest.mark.parametrize(
    ("arguments", "environment", "part"),
    [
        (["model", NAME], {"HF_TOKEN": ""}, "not logged in to the hub: run `hf auth login`"),
        (["model", "mine"], {}, "'mine' is no name on the hub: give user/name"),
        (["model", "user/my model"], {}, "give user/name"),
        (["nowhere", NAME], {}, "no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(elsewhere, model, arguments, environment, part):
    done = elsewhere("-m", "maskgit", "push", *arguments, "--license", "mit", **environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("maskgit: ") and done.stderr.count("\n") == 1
    assert part in done.stderr


# ---------------------------------------------------------------- refused before anything is sent


def test_a_folder_that_does_not_load(model):
    file = model / "transformer" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError) as error:
        dry(model, "--license", "mit")
    one_line(error, model, "is not sent: transformer", "truncated")
    shutil.rmtree(model / "transformer")
    shutil.rmtree(model / "vqgan")
    shutil.rmtree(model / "clip")
    with pytest.raises(UserError) as error:
        dry(model, "--license", "mit")
    one_line(error, "none of vqgan, transformer, clip")


def test_a_licence_is_needed_and_has_an_id(model):
    with pytest.raises(UserError) as error:
        dry(model)
    one_line(error, "the licence of vqgan and transformer and clip", "--license ID")
    with pytest.raises(UserError) as error:
        dry(model, "--license", "My Own")
    one_line(error, "--license My Own", "apache-2.0")
