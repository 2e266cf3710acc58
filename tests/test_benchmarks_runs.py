"""Each benchmark runs from end to end, on tiny models; how fast anything is, no test says."""

import json
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import growth, int8, sampling, stages, tokenizer
from maskgit import MaskGIT, MaskGITConfig, Pipeline
from maskgit.engine.speed import flops_of
from maskgit.evaluation.extractors import open_extractor
from vqgan import VQGAN, VQGANConfig

CONFIG = MaskGITConfig(32, 5, [4, 6], "official", width=48, depth=2, heads=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MaskGIT(CONFIG).eval()


@torch.no_grad()
def test_sampling_is_held_against_the_machine_and_ways_against_the_usual_one(model):
    usual, guided = sampling.unguided_and_guided("tiny", model, 2)
    assert usual["ratio"] > 0 and guided["times"] > 0
    # Of 2 masks alone and 7 passes of 2, and with guidance one mask more and twice as much.
    assert guided["flops"] > 1.8 * usual["flops"]
    *others, sampler, kept = sampling.other_ways("tiny", model, 2)
    assert others[0]["flops"] < usual["flops"] / 7  # one pass
    some = others[1]["flops"]  # guided at 4 of the 8 steps
    assert usual["flops"] < some < guided["flops"]
    assert sampler["flops"] == 0 and kept["flops"] < usual["flops"]


@pytest.mark.slow  # it compiles
@torch.no_grad()
def test_a_compiled_model_is_held_against_the_usual_one_too(model):
    one_pass = partial(model, torch.zeros(1, CONFIG.tokens, dtype=torch.long), torch.tensor([0]))
    expected = 8 * flops_of(one_pass)[1]
    row = sampling.one_compiled("tiny", model)
    assert row["flops"] == expected and row["times"] > 0


@torch.no_grad()
def test_growth_tells_how_many_times_the_row_before(model):
    few, *more = growth.grown(growth.tokens("tiny"))
    assert [round(row["flops"] / few["flops"]) > 3 for row in more] == [True, True]
    assert "times" not in few and all(row["times"] > 0 for row in more)
    rows = list(growth.steps("tiny", model))
    assert [row["what"].split()[-1] for row in rows] == ["1", "2", "4", "8", "16", "32"]
    assert rows[-1]["flops"] > rows[0]["flops"]
    one, two, *_ = growth.batches("tiny", model)
    assert one["flops"] < two["flops"]


@torch.no_grad()
def test_the_tokenizer_goes_both_ways():
    tiny = VQGAN(VQGANConfig(channels=32, mult=[1, 1], decoder_blocks=1, encoder_blocks=1))
    rows = list(tokenizer.rows("tiny", tiny, 4, (1, 2)))
    assert len(rows) == 4 and all(row["ratio"] > 0 for row in rows)
    assert rows[2]["flops"] == 2 * rows[0]["flops"]


@torch.no_grad()
def test_stages_draw_all_images_and_read_them():
    pipe = Pipeline.from_pretrained("emoji", "cpu")
    rows = list(stages.stages("emoji", pipe, open_extractor("emoji", "cpu"), 4, 3))
    assert [row["what"].rpartition(", ")[2].split(" (")[0] for row in rows] == [
        "labels to files",
        "of which tokens",
        "of which pixels",
        "of which PNG files",
        "files to features",
    ]
    assert all(row["images_per_second"] == 4 / row["median"] for row in rows)


@pytest.mark.slow  # bf16 is, where there are no units for it
@torch.no_grad()
def test_int8_and_bf16_are_held_against_fp32(model, monkeypatch):
    [row] = int8.times("tiny", model, (2,))
    assert row["times"] > 0 and "ratio" not in row
    for name, value in dict(FEW=2, MANY=4, IMAGES=8).items():
        monkeypatch.setattr(int8, name, value)
    pipes = {name: Pipeline.from_pretrained("emoji", "cpu", name) for name in int8.PRECISIONS}
    error, same, half_error, half_same = (row["value"] for row in int8.logits(pipes))
    assert 0 < half_error < error < 0.1 and 0.9 < same <= 1 and 0.9 < half_same <= 1
    rows = {row["what"]: row["value"] for row in int8.tokens_and_scores(pipes)}
    shares = [value for what, value in rows.items() if "share" in what or "class" in what]
    assert len(rows) == 8 and len(shares) == 5 and all(0 <= share <= 1 for share in shares)


def test_what_is_there_is_kept_with_what_it_was_measured_on(tmp_path, monkeypatch, capsys):
    """Also where a benchmark ends before its time."""

    def run(full):
        yield {"what": "so", "value": 1.0}
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.evaluation.run", run)
    with pytest.raises(KeyboardInterrupt):
        command.main(["evaluation"])
    result = json.loads((tmp_path / "out/benchmarks/evaluation.json").read_text())
    assert result["rows"] == [{"what": "so", "value": 1.0}]
    assert result["threads"] == torch.get_num_threads() and result["dtype"] in (
        "float32",
        "bfloat16",
    )
    first, columns, row = capsys.readouterr().out.splitlines()
    assert result["processor"] in first and "value" in columns and row.split() == ["so", "1"]
