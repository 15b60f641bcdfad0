"""Work on cores: every item once, operators of one thread, errors raised, and work within work."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

import pytest
import torch

from thresher.shared.core.compute import cores
from thresher.shared.core.compute.cores import even_blocks, on_cores


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def meet(n):
    """Return work that ends only when n items are at work at once."""
    barrier = threading.Barrier(n, timeout=60)

    def work(item):
        barrier.wait()
        return item, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    return work


def test_as_many_items_as_there_are_threads_are_at_work_at_once_each_with_operators_of_one():
    found = on_cores(meet(3), range(6))
    assert [item for item, *_ in found] == list(range(6))
    assert len({thread for _, thread, *_ in found}) == 3
    assert all(rest == [1, False] for _, _, *rest in found)


def test_work_within_work_is_shared_with_cores_that_are_free():
    barrier = threading.Barrier(3, timeout=60)

    def outer(item):
        return on_cores(lambda inner: (barrier.wait(), (item, inner))[1], range(3)) if item == 0 else [(item, None)]

    assert on_cores(outer, range(2)) == [[(0, 0), (0, 1), (0, 2)], [(1, None)]]


def one_on_each_of_two_threads(monkeypatch, by_asker, by_helper):
    """Do one piece of work on this thread and another on the only helper, once both have begun."""
    monkeypatch.setattr(cores, "_helpers", cores._Helpers())
    torch.set_num_threads(2)
    asker, both = threading.get_ident(), threading.Barrier(2, timeout=60)

    def work(_):
        both.wait()
        return by_asker() if threading.get_ident() == asker else by_helper()

    try:
        on_cores(work, range(2))
    finally:
        torch.set_num_threads(3)


def test_who_waits_for_work_helps_with_work_within_it(monkeypatch):
    inner = threading.Barrier(2, timeout=20)
    one_on_each_of_two_threads(monkeypatch, lambda: None, lambda: on_cores(lambda _: inner.wait(), range(2)))


@pytest.mark.parametrize("fails", [False, True])
def test_a_core_that_is_called_too_late_keeps_nothing_of_the_work(monkeypatch, fails):
    class Result:
        pass

    ended, made, kept = threading.Event(), [], []

    def make(_):
        result = Result()
        made.append(weakref.ref(result))
        if fails and len(made) == 3:
            raise ValueError
        return result

    def work():
        with suppress(ValueError):
            on_cores(make, range(3))
        kept.extend(result() for result in made)
        ended.set()

    one_on_each_of_two_threads(monkeypatch, work, lambda: ended.wait(60))
    assert kept == [None] * 3


def test_an_error_ends_the_work_and_is_raised_and_the_next_work_is_whole():
    done = []

    def work(item):
        if item == 2:
            raise ValueError("the second")
        done.append(item)

    with pytest.raises(ValueError, match="the second"):
        on_cores(work, range(1000))
    assert len(done) < 999
    assert on_cores(lambda item: item * item, range(50)) == [item * item for item in range(50)]


def test_nothing_and_one_thing_can_be_worked_on():
    assert on_cores(meet(1), []) == []
    (found,) = on_cores(meet(1), ["one"])
    assert found == ("one", threading.get_ident(), 1, False)


def _in_another_process(queue):
    torch.set_num_threads(2)
    queue.put(on_cores(meet(2), range(2))[1][0])


def test_a_forked_process_has_cores_of_its_own():
    on_cores(meet(3), range(3))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_another_process, args=(queue,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get() == 1


def test_a_process_may_end_at_once_after_work():
    """The process waits for cores that are still releasing their results."""
    code = """
import torch
from thresher.shared.core.compute.cores import on_cores
torch.set_num_threads(3)
on_cores(lambda i: torch.randn(200, 200) @ torch.randn(200, 200), range(64))
on_cores(lambda i: on_cores(lambda j: torch.randn(50, 50), range(3)), range(3))
"""
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("n", "most"), [(0, 4), (1, 4), (4, 4), (9, 4), (4096, 512), (4097, 512)])
def test_blocks_cover_everything_once_and_are_even(n, most):
    blocks = even_blocks(n, most)
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(n))
    sizes = {block.stop - block.start for block in blocks}
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
