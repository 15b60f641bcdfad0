"""Lines of metrics wait on the device until many are read at once."""

from __future__ import annotations

import pytest
import torch

from thresher.train.reporting.metrics import PendingLines


def test_numbers_that_are_here_are_read_at_once():
    pending = PendingLines(0)
    assert pending.add(1, {"a": {"loss": 0.5}})
    assert pending.read() == [(1, {"a": {"loss": 0.5}})]
    assert pending.read() == []


@pytest.mark.parametrize("every", [1, 16, 100])
def test_numbers_on_a_device_wait_for_64_steps(every):
    pending, reads, lines = PendingLines(10), [], []
    numbers = {step: torch.tensor(float(step)) for step in range(10, 400)}
    for step in range(10 + every, 400, every):
        by_sae = {"a": {"loss": numbers[step], "lr": 0.1}, "b": {"mse": numbers[step] * 2}}
        if pending.add(step, by_sae):
            reads.append(step)
            lines += pending.read()
    lines += pending.read()
    expected = [
        (step, {"a": {"loss": step, "lr": 0.1}, "b": {"mse": 2 * step}}) for step in range(10 + every, 400, every)
    ]
    assert lines == expected
    assert reads == list(range(10 + max(64, every), 400, max(64, every)))
