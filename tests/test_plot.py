"""`maskgit plot`: which curves go into which panel, how they look, and mistakes."""

import json
import math
from pathlib import Path

import pytest
from matplotlib import pyplot
from PIL import Image

from maskgit.commands.main import main
from maskgit.commands.plot import choose, draw, read, running_mean, titles
from maskgit.common import UserError


def logged(run, steps=60, **more):
    """A run's folder with values of training, each 10 steps, and held-out ones, each 100."""
    run.mkdir(parents=True)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(10, 10 * steps + 1, 10):
            values = {"loss": 2 + 10 / step, "accuracy": step / 1000, "lr": 1e-3, "gradient_x": 1.0}
            print(json.dumps({"step": step, **values, **more}), file=file)
            if step % 100 == 0:
                held = {
                    "heldout/loss": 2 + 12 / step,
                    "heldout/usage": 0.9,
                    "train/loss": 2 + 9 / step,
                }
                print(json.dumps({"step": step, **held}), file=file)
    return run


@pytest.fixture
def drawn():
    """`drawn(runs, metrics)` is the figure of runs by name; it is closed afterwards."""

    def make(runs, metrics=None):
        curves = {name: read(folder) for name, folder in runs.items()}
        return draw(curves, choose(curves, metrics))

    yield make
    pyplot.close("all")


def panels(figure):
    return {axis.get_title("left"): axis for axis in figure.axes}


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_are_what_was_logged(tmp_path):
    curves = read(logged(tmp_path / "run"))
    assert curves["loss"] == (list(range(10, 601, 10)), [2 + 10 / s for s in range(10, 601, 10)])
    assert curves["heldout/usage"] == ([100, 200, 300, 400, 500, 600], [0.9] * 6)
    assert "step" not in curves


def test_what_tells_most_is_drawn_and_sets_share_a_panel(tmp_path, drawn):
    figure = drawn({"one": logged(tmp_path / "one"), "two": logged(tmp_path / "two")})
    found = panels(figure)
    assert list(found) == ["loss", "accuracy", "usage"]
    # Of each run the values, their mean, and two sets; no sets; one set alone.
    assert [len(axis.lines) for axis in found.values()] == [8, 4, 2]
    assert labels(figure) == ["one", "two", "while training", "heldout", "train"]
    assert found["usage"].get_ylim() == (0, 1.02)
    assert found["accuracy"].get_ylim()[0] == 0 < found["loss"].get_ylim()[0]


def test_training_is_faint_and_heldout_bold(tmp_path, drawn):
    figure = drawn({"one": logged(tmp_path / "one")})
    raw, mean, heldout, train = panels(figure)["loss"].lines
    assert raw.get_alpha() < mean.get_alpha() < 1
    assert max(raw.get_linewidth(), mean.get_linewidth()) < heldout.get_linewidth()
    assert heldout.get_linestyle() != train.get_linestyle()
    assert list(heldout.get_ydata()) == [2 + 12 / s for s in range(100, 601, 100)]
    assert list(mean.get_ydata()) == running_mean(list(raw.get_ydata()))
    assert panels(figure)["accuracy"].lines[1].get_alpha() == 1  # nothing there tells more


def test_each_run_has_a_colour_in_every_panel(tmp_path, drawn):
    runs = {name: logged(tmp_path / name) for name in ("a", "b", "c")}
    figure = drawn(runs)
    shown = [line.get_color() for line in figure.legends[0].get_lines()[:3]]
    assert len(set(shown)) == 3
    for axis in figure.axes:
        assert list(dict.fromkeys(line.get_color() for line in axis.lines)) == shown


def test_metrics_by_name_with_and_without_a_set(tmp_path, drawn):
    runs = {"one": logged(tmp_path / "one", other=2.0)}
    assert list(panels(drawn(runs, ["lr", "heldout/loss"]))) == ["lr", "heldout/loss"]
    assert [len(a.lines) for a in drawn(runs, ["heldout/loss", "loss"]).axes] == [1, 4]
    with pytest.raises(UserError, match=r"--metrics los: .* did you mean 'loss'"):
        drawn(runs, ["los"])
    with pytest.raises(UserError, match=r"--metrics heldout/los: .* 'heldout/loss'"):
        drawn(runs, ["heldout/los"])


def test_runs_of_other_tasks_are_drawn_where_they_have_something(tmp_path, drawn):
    one = logged(tmp_path / "one")
    two = tmp_path / "two"
    two.mkdir()
    (two / "metrics.jsonl").write_text('{"step": 5, "top1": 0.5}\n{"step": 9, "top1": 0.6}\n')
    found = panels(drawn({"one": one, "two": two}))
    assert [len(found[name].lines) for name in ("loss", "top1")] == [4, 1]
    odd = {"odd": {"step_size": ([1], [2.0])}}
    assert choose(odd, None) == {"step_size": ["step_size"]}  # nothing that tells most


def test_a_line_that_is_being_written_and_values_that_are_no_numbers_are_left_out(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 3.0}\n{"step": 3, "lo'
    (run / "metrics.jsonl").write_text(lines)
    assert read(run) == {"loss": ([2], [3.0])}


def test_the_mean_has_no_lag_and_no_more_ends_than_the_curve():
    line = [float(i) for i in range(100)]
    mean = running_mean(line)
    assert len(mean) == 100 and mean[10:-10] == line[10:-10]
    noisy = [i % 2 + 0.0 for i in range(300)]
    assert all(math.isclose(value, 0.5, abs_tol=0.03) for value in running_mean(noisy)[10:-10])


def test_runs_are_named_by_their_folders(tmp_path, monkeypatch):
    for name in ("x/run", "y/run", "other"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert titles([Path("x/run"), Path("y/run"), Path("other"), Path("other")]) == {
        "x/run": Path("x/run"),
        "y/run": Path("y/run"),
        "other": Path("other"),
    }
    monkeypatch.chdir("other")
    assert titles([Path(".")]) == {"other": Path(".")}


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_picture_has_the_format_that_its_name_says(tmp_path, capsys, suffix):
    out = tmp_path / "new" / f"curves.{suffix}"
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert main(["plot", str(one), str(two), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    content = out.read_bytes()
    if suffix == "png":
        with Image.open(out) as image:
            image.load()
            assert image.format == "PNG" and image.width > 800
    else:
        assert b"<svg" in content if suffix == "svg" else content.startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere", "--out", "x.png"], ["no nowhere/metrics.jsonl", "no run of `maskgit train`"]),
        (["empty", "--out", "x.png"], ["empty/metrics.jsonl holds no values as yet"]),
        (["run", "--out", "x.jpg"], ["--out x.jpg", ".png, .svg, .pdf"]),
        (["run", "--out", "x"], ["--out x", ".png, .svg, .pdf"]),
        (["run", "--out", "x.png", "--metrics", "losss"], ["--metrics losss", "'loss'"]),
        (["run", "--out", "run/metrics.jsonl/x.png"], ["cannot write run/metrics.jsonl/x.png"]),
        (["run"], ["--out"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, parts):
    monkeypatch.chdir(tmp_path)
    logged(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert main(["plot", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert all(part in shown.err for part in parts), shown.err
    assert not list(tmp_path.glob("x*"))
