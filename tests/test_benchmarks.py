"""The benchmarks count right, and compare right; how fast anything is, no test says."""

import json
import subprocess
import sys
from functools import partial
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from benchmarks import compare, sampling, shares, startup
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.machine import (
    Shapes,
    all_convolutions,
    beside,
    measure,
    peak_memory,
    products_apart,
    reset_peak,
)
from benchmarks.table import LIMITS, heading, shown
from maskgit import MaskGIT, MaskGITConfig
from maskgit.engine.speed import flops_of
from maskgit.fast import fast

CONFIG = MaskGITConfig(32, 5, [4, 6], "official", width=48, depth=2, heads=4)


@pytest.fixture
def linear():
    weight, bias = torch.randn(20, 30), torch.randn(20)
    return lambda: [F.linear(torch.randn(2, 5, 30), weight, bias) for _ in range(3)]


def convolve():
    return F.conv2d(torch.randn(2, 4, 8, 6), torch.randn(5, 4, 3, 3), stride=2, padding=1)


def test_flops_are_those_of_the_shapes(linear):
    assert flops_of(linear)[1] == 3 * 2 * 10 * 30 * 20
    assert flops_of(convolve)[1] == 2 * 2 * 5 * 4 * 3 * 3 * 4 * 3
    q = torch.randn(1, 4, 24, 8)
    assert flops_of(lambda: F.scaled_dot_product_attention(q, q, q))[1] == 4 * 4 * 24 * 24 * 8


def test_shapes_are_those_that_run(linear):
    with Shapes() as shapes:
        linear()
        convolve()
    assert shapes.products == {(1, 10, 30, 20, torch.float32, torch.device("cpu")): 3}
    [((x, weight, stride, padding, *_), times)] = shapes.convolutions.items()
    assert (x, weight, stride, padding, times) == ((2, 4, 8, 6), (5, 4, 3, 3), (2, 2), (1, 1), 1)


@torch.no_grad()
def test_the_official_transformer_runs_the_products_that_its_formula_says():
    model = MaskGIT(CONFIG).eval()
    tokens, labels = torch.full((1, 24), 32), torch.tensor([1])
    n, d, depth, hidden = 25, 48, 2, 4 * 48
    blocks = depth * (2 * n * d * (4 * d + 2 * hidden) + 4 * n * n * d)
    head = 2 * 24 * d * (d + 32)
    for function in model, fast(model):
        assert flops_of(partial(function, tokens, labels))[1] == blocks + head


def test_a_row_holds_all_repeats_and_their_limit(linear):
    calls = []
    row = measure("so", linear, against=lambda: calls.append(0))
    assert len(row["seconds"]) == 4 and len(calls) == 5
    assert row["flops"] == flops_of(linear)[1]
    assert row["rate"] == row["flops"] / row["median"]
    assert min(row["seconds"]) <= row["median"] <= max(row["seconds"])
    assert min(row[name] for name in ("limit", "ratio", "memory", "times")) > 0
    assert measure("so", convolve, 1, all_convolutions)["ratio"] > 0
    assert not {"ratio", "times"} & set(measure("so", convolve, 1, None))


def test_a_line_has_the_cells_of_its_columns():
    row = {"what": "so", "flops": 3e9, "seconds": [1.0, 3.0], "median": 2.0, "ratio": 0.755}
    cells = heading(LIMITS).split(), shown(row, LIMITS).split()
    told = dict(zip(*cells, strict=True))
    assert told["what"] == "so" and told["GFLOP"] == "3" and told["ratio"] == "0.76"
    assert (told["s"], told["spread"], told["MB"]) == ("2", "2", "-")


def test_the_limit_is_the_best_of_the_products_around_each_repeat():
    """Of three moments that a limit is measured at, and of two shapes, of which one was lucky."""
    moments = iter([[1, 10], [90, 20], [3, 40]])
    row = measure("so", convolve, 2, lambda shapes: lambda: next(moments))
    assert row["limit"] == 20
    one, other = (row["flops"] / seconds for seconds in row["seconds"])
    assert row["ratio"] == pytest.approx((one / 15 + other / 30) / 2)
    assert beside([5, 6, 9], [10, 10, 20, 40]) == 6 / 15  # of 5 / 10, 6 / 15, 9 / 30


def test_the_rates_are_those_of_all_shapes(threads):
    """And of what threads had apart: as it is, for all threads together, and for each."""
    threads(2)
    with Shapes() as shapes:
        F.linear(torch.randn(300, 300), torch.randn(300, 300))
        F.linear(torch.randn(1, 2), torch.randn(2, 2))
        together = products_apart(shapes)()
        shapes.in_turn(F.linear, [(torch.randn(5, 2), torch.randn(2, 2))] * 3)
    assert [len(together), len(products_apart(shapes)())] == [2, 5] and min(together) > 0


def test_what_threads_of_their_own_compute_is_counted(threads):
    model = MaskGIT(CONFIG).eval()
    quick, tokens = fast(model), torch.zeros(4, CONFIG.tokens, dtype=torch.int64)
    threads(2)
    with patch("maskgit.fast.ENOUGH", 1), patch("maskgit.fast.threads_apart", lambda: 2):
        apart = measure("so", lambda: quick(tokens, tokens[:, 0]), 1)["flops"]
    assert apart == flops_of(lambda: quick(tokens, tokens[:, 0]))[1] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux")
def test_a_peak_of_memory_is_seen():
    reset_peak()
    before = peak_memory()
    torch.ones(2**24)  # 64 MB
    assert peak_memory() > before + 32


def test_each_part_that_is_left_out_leaves_the_tokens_as_they_are():
    for config in (CONFIG, MaskGITConfig(32, 5, [4, 6], width=48, depth=2, heads=4)):
        model = MaskGIT(config).eval()
        quick, labels = fast(model), torch.tensor([1, 1, 3])
        expected = sampling.sampled(model, labels, 2.0)()
        for left_out in shares.PARTS.values():
            with left_out():
                again = sampling.afresh(quick, sampling.sampled(quick, labels, 2.0))
                assert torch.equal(again(), expected)


def test_shares_are_measured_in_turns():
    rows = list(shares.shares("tiny", MaskGIT(CONFIG), 4, 0, 2, turns=2))
    assert len(rows) == len(shares.PARTS) + 3
    assert rows[0]["share"] == 1 and all(len(row["seconds"]) == 2 for row in rows)


def written(path, **rows):
    """A made result: seconds by name."""
    listed = [
        {"what": what, "seconds": seconds, "median": sorted(seconds)[len(seconds) // 2]}
        for what, seconds in rows.items()
    ]
    listed.append({"what": "a row of another kind", "value": 1})
    path.write_text(json.dumps({"rows": listed, "processor": path.stem, "threads": 2}))
    return str(path)


def test_compare_tells_what_became_slower_by_more_than_the_noise(tmp_path, capsys):
    times = dict(a=[1, 1.1, 1.2, 1.2], b=[1, 2, 2, 3], c=[2, 2.1, 2.1, 2.2], d=[1, 1, 1])
    old = written(tmp_path / "old.json", **times, gone=[1])
    times = dict(a=[1.3, 1.4, 1.8, 9], b=[2, 2, 2.5, 4], c=[1, 1.1, 1.4, 1.9], d=[2, 2, 2])
    new = written(tmp_path / "new.json", **times, come=[1])
    assert compare.compare(compare.load(old), compare.load(new)) == [
        ("a", 1.8 / 1.2, "slower"),
        ("b", 1.25, "within the noise"),
        ("c", 1.4 / 2.1, "faster"),
        ("d", 2, "too few repeats"),
        ("gone", None, "only in the old one"),
        ("come", None, "only in the new one"),
    ]
    assert main(["compare", old, new]) == 1
    said = capsys.readouterr().out
    assert said.endswith("not the same processor: old and new\nslower: a\n")
    assert main(["compare", old, old]) == 0
    assert capsys.readouterr().out.endswith("nothing is slower by more than the noise\n")


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "none.json").write_text("[]")
    for words, part in (
        (["samplin"], "sampling"),
        (["compare", "a"], "two files"),
        (["compare", str(tmp_path / "no"), str(tmp_path / "no")], "no"),
        (["compare", str(tmp_path / "none.json"), str(tmp_path / "none.json")], "no result"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: ") and part in said


def test_help_names_each_benchmark():
    command = [sys.executable, "-m", "benchmarks", "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in BENCHMARKS)


@pytest.mark.slow
def test_the_stages_of_the_command_make_up_its_time(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = {row["what"].strip(): row for row in startup.run(repeats=1)}
    stages = [row["median"] for what, row in rows.items() if what.startswith("of which")]
    assert len(stages) == len(startup.STAGES) and min(stages) > 0
    assert sum(stages) == pytest.approx(rows["sample --num 1"]["median"])
