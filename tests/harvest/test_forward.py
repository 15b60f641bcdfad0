"""Batches side by side: the same bits from any number of workers, in order, and no more than are asked for."""

from __future__ import annotations

import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import nn

from thresher.harvest.model.forward import choose_workers, forward_passes
from thresher.harvest.model.plan import HarvestPlan
from thresher.harvest.tokens.packing import ContextBatch
from thresher.shared.model.hook_points import ResolvedHookPoint

HOOK = ResolvedHookPoint("embed", "embed", "output", None, 16)


class Model(nn.Module):
    """An embedding that records which thread runs it, and can be paused."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.before = lambda first_token: None
        self.threads: set[tuple[str, int]] = set()

    def forward(self, input_ids):
        self.threads.add((threading.current_thread().name, torch.get_num_threads()))
        self.before(int(input_ids[0, 0]))
        return self.embed(input_ids)


def batches_of(n):
    for i in range(n):
        tokens = np.full((2, 4), i, np.int32)
        yield ContextBatch(tokens, tokens.astype(np.int64), tokens, np.zeros(2, bool), {})


def plan_of(model):
    return HarvestPlan(model, None, {"embed": HOOK}, 1)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_come_in_order_with_their_own_activations(workers):
    model = Model()
    n_threads = torch.get_num_threads()
    second_is_done = threading.Event()

    def hold_the_first(token):
        if token == 0 and workers > 1:
            assert second_is_done.wait(60)
        elif token == 1:
            second_is_done.set()

    model.before = hold_the_first
    got = list(forward_passes(plan_of(model), batches_of(7), workers))
    assert [int(batch.tokens[0, 0]) for batch, *_ in got] == list(range(7))
    for batch, activations, seconds in got:
        assert torch.equal(activations["embed"], model.embed.weight[torch.from_numpy(batch.tokens).long()])
        assert seconds >= 0
    assert {n for _, n in model.threads} == {1}
    assert torch.get_num_threads() == n_threads
    assert not model.embed._forward_hooks


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_batches_begin_than_workers_and_one(workers):
    taken = 0

    def counted():
        nonlocal taken
        for batch in batches_of(20):
            taken += 1
            yield batch

    with closing(forward_passes(plan_of(Model()), counted(), workers)) as passes:
        for n_yielded, _ in enumerate(passes, start=1):
            assert taken <= n_yielded + workers


def test_an_error_comes_where_its_batch_would_have_come():
    model = Model()

    def fail(token):
        if token == 3:
            raise ValueError("three")

    model.before = fail
    passes = forward_passes(plan_of(model), batches_of(9), 2)
    assert [int(next(passes).batch.tokens[0, 0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(passes)
    assert not model.embed._forward_hooks


def test_the_number_of_workers():
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert choose_workers(None, torch.device("cpu")) == 3
        assert choose_workers(5, torch.device("cpu")) == 5
        assert choose_workers(5, torch.device("cuda")) == 1
    finally:
        torch.set_num_threads(n_threads)
