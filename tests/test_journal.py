"""What a run notes: lines that survive a kill, pictures, trackers by name, a disk that is full."""

import json
import resource
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState, tracking
from conftest import one_line
from PIL import Image
from runs import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskgit.commands import main as entry
from maskgit.common import UserError
from maskgit.engine.journal import Journal, check_trackers, entries


@pytest.fixture(autouse=True)
def processes():
    """What the loop's accelerator makes; trackers ask it which process they are in."""
    PartialState(cpu=True)


def journal(run, start=0, trackers=(), **config):
    return Journal(run, start, trackers, config)


def steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# metrics.jsonl.


def test_lines_are_json_with_their_step(tmp_path):
    noted = journal(tmp_path)
    noted.write(1, {"loss": 0.1 + 0.2})
    noted.write(1, {"heldout/psnr": 22.5})
    noted.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.1 + 0.2},
        {"step": 1, "heldout/psnr": 22.5},
    ]


def test_a_kill_at_any_byte_costs_the_last_line_alone(tmp_path):
    noted = journal(tmp_path)
    for step in (1, 2, 3):
        noted.write(step, {"loss": 1 / step, "accuracy": 0.5})
    file = tmp_path / "metrics.jsonl"
    content = file.read_bytes()
    kept = content[: content.rindex(b'{"step": 3')]
    for size in range(len(kept), len(content)):
        file.write_bytes(content[:size])
        resumed = journal(tmp_path, start=3)
        assert file.read_bytes() == kept
        resumed.write(3, {"loss": 1 / 3, "accuracy": 0.5})
        assert file.read_bytes() == content


def test_what_lies_beyond_the_checkpoint_is_dropped(tmp_path):
    noted = journal(tmp_path)
    for step in (10, 20, 30, 40):
        noted.write(step, {"loss": 0.5})
        noted.write(step, {"heldout/loss": 0.6})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    journal(tmp_path, start=20)
    assert steps(tmp_path) == [10, 10, 20, 20]
    assert before.startswith((tmp_path / "metrics.jsonl").read_bytes())
    journal(tmp_path, start=0)
    assert steps(tmp_path) == []


@pytest.mark.parametrize("damage", [b"\0\0\0\0\n", b"[1, 2]\n", b'"step"\n', b'{"loss": 1}\n'])
def test_a_line_that_a_power_cut_left_ends_what_is_read(tmp_path, damage):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + damage)
    assert [values for _, values in entries(file)] == [{"step": 1}]
    journal(tmp_path, start=5)
    assert file.read_bytes() == b'{"step": 1}\n'


# Pictures.


def test_a_picture_is_rounded_and_stands_whole_or_not_at_all(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / ".step_00000007.png.123").write_bytes(b"left by a kill")
    noted = journal(tmp_path)
    image = torch.rand(3, 5, 9)
    noted.picture(7, image)
    noted.close()
    [file] = (tmp_path / "samples").iterdir()
    assert file.name == "step_00000007.png"
    expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(file)), expected)


# Trackers.


def seen(run):
    """What TensorBoard shows of a run."""
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_has_numbers_sheets_and_settings(tmp_path):
    noted = journal(tmp_path, trackers=["tensorboard"], train={"lr": 0.5, "betas": [0.9, 0.96]})
    noted.write(3, {"loss": 2.0, "heldout/image_to_text@10": 0.25})
    image = torch.rand(3, 6, 8)
    noted.picture(3, image)
    noted.close()
    board = seen(tmp_path)
    assert board.Scalars("loss")[0].value == 2.0 and board.Scalars("loss")[0].step == 3
    assert board.Scalars("heldout/image_to_text_10")[0].value == 0.25
    [picture] = board.Images("samples")
    assert (picture.step, picture.width, picture.height) == (3, 8, 6)
    [text] = board.Tensors("config/text_summary")
    assert b"train.betas: [0.9, 0.96]" in text.tensor_proto.string_val[0]
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 1 and files[0].is_file()


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    for start, last in ((0, 4), (2, 3)):
        noted = journal(tmp_path, start, ["tensorboard"])
        for step in range(start + 1, last + 1):
            noted.write(step, {"loss": 10.0 * start + step})
        noted.close()
    assert [(e.step, e.value) for e in seen(tmp_path).Scalars("loss")] == [(1, 1), (2, 2), (3, 23)]


def test_no_tracker_is_a_choice(tmp_path):
    noted = journal(tmp_path)
    noted.write(1, {"loss": 1.0})
    noted.picture(1, torch.zeros(3, 4, 4))
    noted.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "samples"]


class Diary(tracking.GeneralTracker):
    """A tracker such as others may give to accelerate: it keeps a file of its own."""

    name = "diary"
    requires_logging_directory = False
    file = None

    def __init__(self, project):
        super().__init__()
        self.say(project=project)

    @property
    def tracker(self):
        return self.file

    def say(self, **words):
        with self.file.open("a") as file:
            file.write(json.dumps(words) + "\n")

    def store_init_configuration(self, values):
        self.say(config=values)

    def log(self, values, step=None):
        self.say(step=step, values=values)

    def finish(self):
        self.say(finished=True)


@pytest.fixture
def diary(monkeypatch, tmp_path):
    """The file of a tracker that is installed under the name "diary"."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "diary", Diary)
    monkeypatch.setattr(tracking, "_available_trackers", ["tensorboard", "diary"])
    monkeypatch.setattr(Diary, "file", tmp_path / "diary.jsonl")
    return Diary.file


def test_any_tracker_of_accelerates_by_name(tmp_path, diary):
    run = tmp_path / "run"
    noted = journal(run, 0, ["diary", "diary"], train={"lr": 0.5, "ema": None}, task="clip")
    noted.write(1, {"loss": 1.5, "heldout/text_to_image@10": 0.5})
    noted.picture(1, torch.zeros(3, 4, 4))
    noted.close()
    assert [json.loads(line) for line in diary.read_text().splitlines()] == [
        {"project": "maskgit"},
        {"config": {"train.lr": 0.5, "train.ema": "None", "task": "clip"}},
        {"step": 1, "values": {"loss": 1.5, "heldout/text_to_image_10": 0.5}},
        {"finished": True},
    ]


def test_a_tracker_that_does_not_start_is_told_and_the_others_are_finished(
    tmp_path, diary, monkeypatch
):
    class Remote(Diary):
        name = "remote"

        def start(self):
            raise ConnectionError("no server\nat all")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "remote", Remote)
    monkeypatch.setattr(tracking, "_available_trackers", ["remote", "diary"])
    before = threading.excepthook
    with pytest.raises(UserError) as error:
        journal(tmp_path, 0, ["diary", "remote"])
    one_line(error, "train.trackers: remote does not start (no server at all)", "leave it out")
    assert json.loads(diary.read_text().splitlines()[-1]) == {"finished": True}
    assert threading.excepthook is before


def test_trackers_that_cannot_be_had_are_named(monkeypatch):
    check_trackers(["tensorboard"])
    monkeypatch.setattr(tracking, "_available_trackers", ["tensorboard"])
    with pytest.raises(UserError) as error:
        check_trackers(["tensorboard", "wandb"])
    one_line(error, "wandb is not installed", "installed: tensorboard", "pip install wandb")
    with pytest.raises(UserError) as error:
        check_trackers(["tensorbord"])
    one_line(error, "train.trackers", "did you mean 'tensorboard'")


# A disk that is full.


def fill(trackers, limit, write):
    """Hook: the command is to note a thousand steps in files of `limit` bytes."""

    def dispatch(arguments):
        PartialState(cpu=True)
        with closing(journal(Path("run"), trackers=trackers)) as noted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            for step in range(1, 1000):
                write(noted, step)

    entry.dispatch = dispatch


def line(noted, step):
    noted.write(step, {"loss": 1.0})


def picture(noted, step):
    noted.picture(step, torch.rand(3, 40, 40))


@pytest.mark.parametrize(
    ("trackers", "limit", "write", "where"),
    [
        ([], 1000, line, "run/metrics.jsonl"),
        (["tensorboard"], 3000, line, "run/tensorboard"),
        ([], 1000, picture, "run/samples/step_00000001.png"),
    ],
)
def test_a_full_disk_is_one_line_and_costs_nothing_before(tmp_path, trackers, limit, write, where):
    status, out, err = run(tmp_path, [], partial(fill, trackers, limit, write))
    assert err == f"maskgit: cannot write {where}: File too large\n"
    assert (status, out) == (1, "")
    assert not list((tmp_path / "run" / "samples").glob("step_*"))  # none that is torn
    noted = journal(tmp_path / "run", start=1000)
    assert not list((tmp_path / "run" / "samples").iterdir())
    noted.write(1001, {"loss": 1.0})
    if write is line:
        assert steps(tmp_path / "run")[-1] == 1001
        assert steps(tmp_path / "run")[:-1] == list(range(1, len(steps(tmp_path / "run"))))
        assert len(steps(tmp_path / "run")) > 20
