"""Parts of a batch on threads of their own: each computes alone, and nobody else notices."""

import os
import sys
import threading
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, execute

from maskgit.threads import by_threads, threads_apart, workers


@pytest.fixture(autouse=True)
def two_threads(threads):
    threads(2)


def test_results_come_in_order_each_from_a_thread_that_computes_alone_without_gradients():
    weight = torch.ones(3, requires_grad=True)
    seen = []

    def double(x):
        seen.append((threading.get_ident(), torch.get_num_threads(), (weight * 2).requires_grad))
        return 2 * x

    results = by_threads(double, [(torch.tensor(i),) for i in range(5)])
    assert [int(x) for x in results] == [0, 2, 4, 6, 8]
    assert {found[1:] for found in seen} == {(1, False)}
    assert threading.get_ident() not in {found[0] for found in seen}


def test_other_threads_keep_theirs():
    workers.cache_clear()
    by_threads(torch.neg, [(torch.ones(1),)])
    numbers = [torch.get_num_threads()]
    new = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert numbers == [2, 2] and torch.is_grad_enabled()


def test_as_many_at_a_time_as_there_are_threads():
    both = threading.Barrier(2, timeout=60)
    by_threads(lambda x: (both.wait(), x)[1], [(torch.ones(1),)] * 4)


def test_an_error_of_a_part_is_the_callers():
    with pytest.raises(RuntimeError, match="size"):
        by_threads(torch.add, [(torch.ones(2), torch.ones(2)), (torch.ones(2), torch.ones(3))])


def test_none_compute_apart_where_they_would_be_other_than_their_caller():
    affinity = "os.sched_getaffinity"
    with patch(affinity, lambda process: {0, 1}, create=True):
        assert threads_apart() == 2
        with torch.autocast("cpu"):
            assert threads_apart() == 1
    with patch(affinity, lambda process: {0}, create=True):
        assert threads_apart() == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    done = execute(sys.executable, "-c", FORKS, cwd=ROOT)
    assert done.returncode == 0, done.stderr


FORKS = """
import os, torch
from maskgit.threads import by_threads
ones = [(torch.ones(1),)] * 3
torch.set_num_threads(2)
by_threads(torch.neg, ones)
child = os.fork()
negated = by_threads(torch.neg, ones)
if not child:
    os._exit(int(torch.cat(negated).tolist() != [-1] * 3))
assert os.waitpid(child, 0)[1] == 0
"""
