"""Models of the hub, from a small one on this machine: revisions, the cache, what goes wrong."""

import errno
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, execute
from hub_server import TOKEN, Repository, serving
from tiny_clip import save_clip
from tiny_tokenizer import save_tokenizer

from maskgit import MaskGIT, MaskGITConfig, Pipeline
from maskgit.common.folder import find
from maskgit.common.hub import hub_id
from vqgan import VQGAN

PRESET = {"mine": {"settings": {"steps": 2}}}


def save_pipeline(folder, seed=0):
    """A tiny pipeline with random weights, a preset and a CLIP, in a folder."""
    vqgan = VQGAN.from_pretrained(save_tokenizer(folder / "vqgan", seed=seed))
    torch.manual_seed(seed)
    config = MaskGITConfig(16, 2, [4, 4], width=16, depth=1, heads=2, ffn=32)
    pipe = Pipeline(vqgan, MaskGIT(config), ["cat", "red dog"], {"steps": 3}, PRESET)
    pipe.save_pretrained(folder)
    save_clip(folder / "clip", seed=seed)
    return folder


def contents(folder):
    """The files in a folder and those in it, by their names from there."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [save_pipeline(tmp_path_factory.mktemp(f"model{seed}"), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def hub(folders):
    """A hub that has user/model, whose first version is tagged v1, and user/secret."""
    with serving() as hub:
        repo = hub.repos["user/model"] = Repository()
        repo.refs["v1"] = repo.commit({**contents(folders[0]), "notes.md": b"unread"}, "first")
        repo.commit(contents(folders[1]), "second")
        hub.repos["user/secret"] = Repository(private=True)
        hub.repos["user/secret"].commit(contents(folders[0]), "first")
        yield hub


@pytest.fixture
def elsewhere(hub, tmp_path):
    """`elsewhere(*command)` runs Python in a folder and with a cache of its own."""

    def run(*arguments, **environment):
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        settings |= {"PYTHONPATH": str(ROOT), **environment}
        return execute(sys.executable, *arguments, cwd=tmp_path, **settings)

    return run


LOAD = """
import hashlib, json, sys
from clip import CLIP
from maskgit import MaskGIT, Pipeline
from vqgan import VQGAN

def digest(module):
    tensors = (t.float().numpy().tobytes() for t in module.state_dict().values())
    return hashlib.sha256(b"".join(tensors)).hexdigest()

for argument in sys.argv[1:]:
    source, _, revision = argument.partition("#")
    pipe = Pipeline.from_pretrained(source, "cpu", "fp32", revision=revision or None)
    classes = (VQGAN, MaskGIT, CLIP)
    parts = [cls.from_pretrained(source, revision=revision or None) for cls in classes]
    settings = {"labels": pipe.labels, "presets": pipe.presets}
    found = [digest(part) for part in (pipe.vqgan, pipe.transformer, *parts)]
    print(json.dumps({"digests": found, **settings}))
"""
FIND = """
import sys
from maskgit.common import UserError
from maskgit.common.folder import find

for argument in sys.argv[1:]:
    source, _, revision = argument.partition("#")
    try:
        print(find(source, revision or None))
    except UserError as error:
        print("refused:", error)
assert "torch" not in sys.modules
"""
NOWHERE = "http://127.0.0.1:9"  # where no server listens


def test_a_model_by_revision_then_from_the_cache(elsewhere, folders, hub):
    """What the hub gives is what the local folder has, and it is asked but once."""
    hub.requests.clear()
    sha = hub.repos["user/model"].refs["main"]
    ways = ["user/model#v1", "user/model@v1", "user/model", "user/model", f"user/model@{sha}"]
    done = elsewhere("-c", FIND, *ways)
    assert (done.returncode, done.stderr) == (0, "")  # and no progress bars in a pipe
    found = done.stdout.splitlines()
    wanted = [contents(folder) for folder in folders]
    assert [wanted.index(contents(path)) for path in found] == [0, 0, 1, 1, 1]
    asked = hub.requests.copy()
    # One process takes one commit for all parts of a model, whatever is pushed meanwhile.
    assert len([line for line in asked if "/revision/main" in line]) == 1
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}):
        assert elsewhere("-c", FIND, *ways, **environment).stdout.splitlines() == found
    assert hub.requests == asked


@pytest.mark.slow
def test_all_classes_load_from_the_hub_what_they_load_from_a_folder(elsewhere, folders):
    done = elsewhere("-c", LOAD, *folders, "user/model#v1", "user/model@v1", "user/model")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, *found = map(json.loads, done.stdout.splitlines())
    assert first["digests"] != second["digests"]
    assert first["labels"] == ["cat", "red dog"] and first["presets"] == PRESET
    assert found == [first, first, second]


def test_a_local_folder_comes_first(folders, tmp_path, monkeypatch):
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("user/model", "user/model@v1"):
        (tmp_path / name).symlink_to(folders[0])
        assert find(name) == Path(name)


def test_what_is_not_given_is_one_line(elsewhere):
    cases = [
        ("user/model", {"HF_ENDPOINT": NOWHERE}, ["user/model", "Connection refused"]),
        ("user/model", {"HF_HUB_OFFLINE": "1"}, ["user/model", "HF_HUB_OFFLINE=0"]),
        ("user/model@v9", {}, ["user/model", "at revision v9", "Revision Not Found"]),
        ("user/none", {}, ["user/none", "Repository Not Found", "hf auth login"]),
        ("user/secret", {}, ["user/secret", "Repository Not Found", "hf auth login"]),
    ]
    for model, environment, parts in cases:
        [line] = elsewhere("-c", FIND, model, **environment).stdout.splitlines()
        assert line.startswith("refused: no folder user/")
        assert all(part in line for part in [*parts, "fetch its *.json and *.safetensors files"])
    [line] = elsewhere("-c", FIND, "some/where/else").stdout.splitlines()
    assert line.startswith("refused: no model at some/where/else: not a folder")


FULL = """
import resource, signal, sys
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from maskgit.common.folder import find
try:
    find("user/model")
except OSError as error:
    print(error.errno, error.filename)
"""


def test_a_full_disk_is_no_fault_of_the_hub(elsewhere, tmp_path):
    """It is what the command tells of any full disk, with the place of the cache."""
    done = elsewhere("-c", FULL)
    assert done.stdout.startswith(f"{errno.EFBIG} {tmp_path / 'hf'}"), done.stderr


@pytest.mark.slow
def test_commands_take_a_model_of_the_hub(elsewhere, hub, tmp_path):
    command = ("-m", "maskgit", "sample", "--class", "cat", "--num", "1", "--out")
    done = elsewhere(*command, "a.png", "--model", "user/secret", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    done = elsewhere(*command, "b.png", "--model", "user/model@v1", "--preset", "mine")
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
    assert {"a.png", "b.png"} <= {path.name for path in tmp_path.iterdir()}


def test_names_and_revisions():
    assert hub_id("user/name") == ("user/name", None)
    assert hub_id("user/name@refs/pr/1") == ("user/name", "refs/pr/1")
    assert hub_id("user/name@v1", "v2") == ("user/name", "v2")
    for other in ("emoji", "./user/name", "/user/name", "~/name", "a/b/c", "a b/c", "../name"):
        assert hub_id(other) is None
