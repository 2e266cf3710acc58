"""FLOPs of steps, the machine's rate, and what a run says of both."""

import json
import os
import signal
import socket

import pytest
import torch
from runs import pair
from test_engine import GAN, QUIET, all_tensors, images, maskgit_task, tokens, vqgan_task
from torch.utils.flop_counter import FlopCounterMode

from maskgit.common.processes import rank, world
from maskgit.engine import loop, speed
from maskgit.engine.loop import Stopped, make_accelerator, train
from maskgit.engine.speed import APART, Pace, flops_of, is_counted, matrix_rate
from maskgit.engine.state import FLOPS, State
from maskgit.engine.task import TrainConfig

SHARE = "share_of_matrix_rate"


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def counted(task, stream, **settings):
    """FLOPs of the first step, as logged."""
    config = TrainConfig(steps=4, batch_size=4, **QUIET, **settings)
    state = State(task, config, make_accelerator(config), print)
    batch = next(stream(0))
    own = {k: v.chunk(world())[rank()] for k, v in batch.items()}
    state.heed(state.counted(own, 0))
    return state.logged()[FLOPS]


def test_a_linear_layer_has_its_formula():
    layer, x = torch.nn.Linear(30, 20), torch.randn(10, 30, requires_grad=True)
    result, flops = flops_of(lambda: layer(x).sum().backward() or "done")
    assert (result, flops) == ("done", 3 * 2 * 10 * 30 * 20)
    assert flops_of(lambda: x + 1)[1] == 0
    layer.compile(backend="eager")
    assert flops_of(lambda: layer(x), compiled=True)[1] == 2 * 10 * 30 * 20


def test_they_are_those_that_torch_counts():
    """Convolutions and attention among them; the transformer's formula is in test_dry_run.py."""
    for make, stream in (lambda: vqgan_task(quantize_from=0), images), (maskgit_task, tokens):
        with FlopCounterMode(display=False) as counter:
            flops = counted(make(), stream)
        assert flops == counter.get_total_flops() > 0


def test_the_number_of_a_step_says_whether_it_is_counted():
    assert [s for s in range(1000) if is_counted(s, 250)] == [0, 250, 500, 750]
    assert [s for s in range(400) if is_counted(s, 30)] == [0, 120, 240, 360]
    assert [s for s in range(2 * APART) if is_counted(s, 1)] == [0, APART]
    assert not any(is_counted(s, 0) for s in range(9))


def test_a_machine_has_a_rate_and_the_run_keeps_its_random_numbers():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert matrix_rate(torch.device("cpu"), torch.float32) > 0
    assert matrix_rate(torch.device("cpu"), torch.bfloat16) > 0
    assert torch.equal(torch.rand(3), expected)


def test_a_pace_tells_units_and_the_share():
    pace = Pace(machine=1000.0)
    pace.steps, pace.seconds, pace.flops = 4, 2.0, 125.0
    found = pace.rates(8, {"images": 1, "tokens": 16})
    assert found == {"images_per_second": 16, "tokens_per_second": 256, SHARE: 0.25}
    pace.steps, pace.seconds, pace.flops = 4, 2.0, 0.0
    assert pace.rates(8, {"images": 1}) == {"images_per_second": 16}


@pytest.mark.parametrize(
    ("make", "stream"), [(lambda: vqgan_task(**GAN), images), (maskgit_task, tokens)]
)
def test_to_count_changes_no_bit(make, stream, tmp_path, monkeypatch):
    config = TrainConfig(steps=6, batch_size=4, warmup=2, **QUIET)
    found = []
    for count in (False, True):
        monkeypatch.setattr(loop, "is_counted", lambda step, every, count=count: count)
        task, folder = make(), tmp_path / str(count)
        train(task, stream, {}, config, folder)
        found.append(all_tensors(task, folder))
        assert [SHARE in line for line in lines(folder)] == [count] * 6
    one, other = found
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_says_what_its_machine_can_do_and_logs_its_share_of_it(tmp_path):
    said = []
    config = TrainConfig(steps=5, batch_size=4, **{**QUIET, "log_every": 2})
    last = train(maskgit_task(), tokens, {}, config, tmp_path, said.append)
    assert len([s for s in said if s.startswith("this machine's products: ")]) == 1
    assert any(s.endswith(" GFLOP/s in fp32") for s in said)
    assert all(line[SHARE] > 0 and FLOPS not in line for line in lines(tmp_path))
    assert last[SHARE] > 0 and {"images_per_second", "tokens_per_second"} <= last.keys()
    config.steps = 7  # one that goes on has counted nothing yet
    train(maskgit_task(), tokens, {}, config, tmp_path, said.append)
    assert [SHARE in line for line in lines(tmp_path)] == [True] * 3 + [False] * 2


def test_where_nothing_is_logged_nothing_is_measured(tmp_path):
    said = []
    config = TrainConfig(steps=2, batch_size=4, **{**QUIET, "log_every": 0})
    last = train(maskgit_task(), tokens, {}, config, tmp_path, said.append)
    assert not said and SHARE not in last and last["images_per_second"] > 0


def test_micro_batches_are_as_much_work():
    whole = counted(maskgit_task(), tokens)
    assert counted(maskgit_task(), tokens, micro_batch=1) == whole > 0


def in_two(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": (folder / "port").read_text()}
    flops = counted(maskgit_task(), tokens)
    (folder / str(rank)).write_text(str(flops))
    torch.distributed.destroy_process_group()


def test_two_processes_are_as_much_work_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    pair(in_two, tmp_path)
    both = [float((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert both == [counted(maskgit_task(), tokens)] * 2


@pytest.mark.slow  # it compiles
def test_a_compiled_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, threads):
    """Counted steps run uncompiled: they must be the same ones in both. On one thread: on several,
    compiled code adds in any order, and no two runs are the same."""
    monkeypatch.setattr(speed, "APART", 10)
    threads(1)
    config = TrainConfig(steps=14, batch_size=4, warmup=2, compile=True, **QUIET)

    def stopped(start):
        for step, batch in enumerate(tokens(start), start):
            if start == 0 and step == 11:  # counted are 0 and 10
                signal.raise_signal(signal.SIGTERM)
            yield batch

    train(maskgit_task(), tokens, {}, config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(maskgit_task(), stopped, {}, config, tmp_path / "parts")
    train(maskgit_task(), stopped, {}, config, tmp_path / "parts")
    one, other = (all_tensors(None, tmp_path / name) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
