"""A capture that fails costs its graph: the run continues by launches, on its own stream and with its own memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

import thresher.train.step.step_graphs as graphs_module
from thresher.train.architectures.contract import Batch
from thresher.train.step.step_graphs import StepGraphs, capture_on_cuda

POOL = (0, 7)
OWN, SIDE = SimpleNamespace(device_index=3), SimpleNamespace(device_index=3)
NOT_PERMITTED = RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def cuda(monkeypatch):
    """Stand for PyTorch's captures: its current stream, and the pools that allocate."""
    state = SimpleNamespace(stream=OWN, allocating=[], end_fails=False)

    class Capture:
        def __init__(self, graph, pool, capture_error_mode):
            self.pool = pool

        def __enter__(self):
            self.before, state.stream = state.stream, SIDE
            state.allocating.append((3, self.pool))

        def __exit__(self, *error):
            # `CUDAGraph.capture_end` raises before it ends the pool's allocations, and the stream is restored after it.
            if state.end_fails:
                raise NOT_PERMITTED
            state.allocating.remove((3, self.pool))
            state.stream = self.before

    def end(device, pool):
        if (device, pool) not in state.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        state.allocating.remove((device, pool))

    monkeypatch.setattr(graphs_module, "_pool", lambda: POOL)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: state.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(state, "stream", stream))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return state


@pytest.mark.parametrize(
    ("error", "end_fails"),
    [(NOT_PERMITTED, True), (NOT_PERMITTED, False), (OutOfResources(300, 227, "shared memory"), False)],
)
def test_a_capture_that_fails_is_survived(cuda, capsys, error, end_fails):
    cuda.end_fails = end_fails
    runs = []

    def step(batch):
        runs.append(cuda.stream)
        if cuda.stream is SIDE:
            raise error
        return {"loss": batch.x.sum()}

    x = torch.ones(2, 3)
    graphs = StepGraphs(capture_on_cuda)
    assert [graphs(step, Batch(x, x), key=0)["loss"] for _ in range(6)] == [6] * 6
    assert runs == [OWN] * 3 + [SIDE] + [OWN] * 3
    assert cuda.stream is OWN
    assert cuda.allocating == []
    said = capsys.readouterr().err
    assert said.startswith("warning: steps are not captured in a CUDA graph: ")
    assert len(said.splitlines()) == 1


def test_what_is_not_the_captures_fault_is_raised(cuda):
    x = torch.ones(2, 3)
    graphs = StepGraphs(capture_on_cuda)

    def step(batch):
        if len(taken) == 3:
            raise ValueError("a bug")
        return {"loss": batch.x.sum()}

    taken = []
    for _ in range(3):
        taken.append(graphs(step, Batch(x, x), key=0))
    with pytest.raises(ValueError, match="a bug"):
        graphs(step, Batch(x, x), key=0)


def test_a_graph_is_replayed_once_its_key_has_settled(cuda):
    x = torch.ones(2, 3)
    graphs, runs = StepGraphs(capture_on_cuda), []

    def step(batch):
        runs.append(cuda.stream)
        return {"loss": batch.x.sum(), "l0": 2.0}

    found = [graphs(step, Batch(x, x), key=0) for _ in range(6)]
    assert runs == [OWN] * 3 + [SIDE]
    assert list(found[-1]) == ["loss", "l0"]
    assert cuda.stream is OWN


@pytest.mark.parametrize("others", [(None, None), ("target", None), (None, "row_weights"), ("target", "row_weights")])
def test_a_replay_reads_all_of_its_batch(others):
    """A capture that keeps the launches, and replays them on what the graph's own tensors then hold."""
    graphs, captured = StepGraphs(lambda run: captured.append(run) or run), []

    def step(batch):
        weights = 1.0 if batch.row_weights is None else batch.row_weights
        return {"loss": ((batch.x + batch.x_compute.float() - batch.y) * weights).sum()}

    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        x, target, weights = (torch.rand(2, width, generator=generator) for width in (3, 3, 1))
        given = [value if name else None for name, value in zip(others, (target, weights), strict=True)]
        batch = Batch(x, x.bfloat16(), *given)
        assert graphs(step, batch, key=0)["loss"] == pytest.approx(float(step(batch)["loss"]), rel=1e-6)
    assert len(captured) == 1
