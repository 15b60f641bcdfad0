"""Forward passes, copies to the host and their use overlap, on a simulated device whose copies end late."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from thresher.harvest.model.forward import _overlapped
from thresher.harvest.tokens.packing import ContextBatch
from thresher.shared.core.compute.host_copies import SLOTS, HostCopies

CPU = torch.device("cpu")


class SimulatedCuda:
    """Streams whose work is done when the host waits for an event behind it, and not before."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.waited: list[object] = []
        simulated = self

        class Stream:
            def __init__(self, device=None) -> None:
                self.queue: list[object] = []
                self.waits_for: list[object] = []

            def wait_stream(self, other) -> None:
                self.waits_for.append(other)

        class Event:
            def record(self, stream) -> None:
                self.stream, self.upto = stream, list(stream.queue)

            def synchronize(self) -> None:
                simulated.log.append("wait")
                for work in self.upto:
                    if work in self.stream.queue:
                        self.stream.queue.remove(work)
                        work()

        class Queueing(TorchFunctionMode):
            def __init__(self, stream) -> None:
                super().__init__()
                self.stream = stream

            def __torch_function__(self, func, types, args=(), kwargs=None):
                name, kwargs = getattr(func, "__name__", ""), kwargs or {}
                if name == "copy_":
                    assert kwargs == {"non_blocking": True}
                    assert self.stream.waits_for, "the copy does not wait for the forward pass"
                    target, source = args
                    self.stream.queue.append(lambda: torch.Tensor.copy_(target, source))
                    simulated.log.append("copy")
                    simulated.copied.append(source)
                    return target
                return func(*args, **kwargs)

        self.copied: list[torch.Tensor] = []
        self.held: list[torch.Tensor] = []
        self.current = Stream()
        self.Stream, self.Event = Stream, Event

        @contextmanager
        def stream(stream):
            def hold(tensor, user):
                assert user is stream
                simulated.held.append(tensor)

            with pytest.MonkeyPatch.context() as patch, Queueing(stream):
                patch.setattr(torch.Tensor, "record_stream", hold)
                yield

        self.stream = stream

    def current_stream(self, device=None):
        return self.current


def batches_of(sizes):
    for i, n in enumerate(sizes):
        tokens = np.full((n, 4), i, np.int32)
        yield ContextBatch(tokens, tokens.astype(np.int64), tokens, np.zeros(n, bool), {})


def rows_of(tokens):
    table = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return {"a": table[tokens], "b": 2 * table[tokens][..., :3]}


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_batch_arrives_rounded_and_is_not_overwritten_while_it_is_used(n, dtype):
    cuda = SimulatedCuda()
    sizes = [2] * (n - 1) + [1] * (n > 0)
    seen = 0
    for harvested in _overlapped(rows_of, batches_of(sizes), HostCopies(CPU, dtype, cuda), CPU):
        for name, expected in rows_of(torch.from_numpy(harvested.batch.tokens).long()).items():
            assert torch.equal(harvested.activations[name], expected.to(dtype))
        assert int(harvested.batch.tokens[0, 0]) == seen
        seen += 1
    assert seen == n
    assert len(cuda.held) == len(cuda.copied) == 2 * n, "the device keeps what is being copied"
    assert all(one is other for one, other in zip(cuda.held, cuda.copied, strict=True))


def test_later_batches_are_queued_before_the_host_waits_for_one():
    cuda = SimulatedCuda()

    def read(tokens):
        cuda.log.append("forward")
        return {"a": rows_of(tokens)["a"]}

    passes = _overlapped(read, batches_of([2] * 5), HostCopies(CPU, torch.float32, cuda), CPU)
    next(passes)
    assert cuda.log == ["forward", "copy"] * SLOTS + ["wait"]
    next(passes)
    assert cuda.log == ["forward", "copy"] * SLOTS + ["wait", "forward", "copy", "wait"]
    assert len(list(passes)) == 3


def test_buffers_are_a_ring():
    copies = HostCopies(CPU, torch.float32, SimulatedCuda())
    found = [copies.start({"a": torch.full((3, 2), float(i))}).wait()["a"] for i in range(2 * SLOTS)]
    places = [rows.data_ptr() for rows in found]
    assert len(set(places)) == SLOTS
    assert places[:SLOTS] == places[SLOTS:]
    assert copies.start({"a": torch.zeros(9, 2)}).wait()["a"].shape == (9, 2)
