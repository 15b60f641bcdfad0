"""Steps replayed as CUDA graphs: once shapes have settled, the host launches one graph instead of a hundred kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..architectures.contract import Batch, Number

_EAGER_STEPS = 3
_MOST_GRAPHS = 4

Run = Callable[[Batch], dict[str, Number]]
Capture = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True)
class _Captured:
    batch: Batch
    names: list[str]
    numbers: list[Tensor]
    replay: Callable[[], None]


class StepGraphs:
    """A step that runs as it is until its key has been the same for three steps, and from then on as a graph.

    The key says all that fixes a step's launches: its shapes, and whatever else the host decides. What changes
    from step to step besides the batch must be read from the device, and state be changed in place. Kernels are
    compiled by the steps before the capture. Where `capture` is None steps are never captured.
    """

    def __init__(self, capture: Capture | None):
        self._capture = capture
        self._graphs: dict[Hashable, _Captured] = {}
        self._key: Hashable = None
        self._steps_alike = 0

    def __call__(self, run: Run, batch: Batch, key: Hashable | None) -> dict[str, Number]:
        """Take a step by `run` and return its numbers, which later steps do not change.

        A key of None is never captured. After a capture that failed steps run as they are, and raise what was not the
        capture's fault.
        """
        if key not in self._graphs and (self._capture is None or key is None or not self._settled(key)):
            return run(batch)
        if key not in self._graphs:
            try:
                self._graphs[key] = _capture_step(run, batch, self._capture)
            except Exception as error:  # Triton's errors are no RuntimeErrors
                self._capture = None
                print(f"warning: steps are not captured in a CUDA graph: {error}"[:300], file=sys.stderr)
                return run(batch)
            for old in list(self._graphs)[:-_MOST_GRAPHS]:
                del self._graphs[old]
        captured = self._graphs[key]
        for static, tensor in zip(_tensors(captured.batch), _tensors(batch), strict=True):
            static.copy_(tensor)
        captured.replay()
        return dict(zip(captured.names, captured.numbers[0].clone().unbind(), strict=True))

    def _settled(self, key: Hashable) -> bool:
        """Return whether enough steps of this key have run, so that all that they compile is compiled."""
        self._steps_alike = self._steps_alike + 1 if key == self._key else 0
        self._key = key
        return self._steps_alike >= _EAGER_STEPS


def _capture_step(run: Run, batch: Batch, capture: Capture | None) -> _Captured:
    assert capture is not None
    x = torch.empty_like(batch.x)
    x_compute = x if batch.x_compute is batch.x else torch.empty_like(batch.x_compute)
    static = Batch(x, x_compute, None if batch.target is None else torch.empty_like(batch.target))
    names: list[str] = []
    numbers: list[Tensor] = []

    def step() -> None:
        found = run(static)
        names[:] = found
        numbers[:] = [torch.stack([_on_device(value, batch.x.device) for value in found.values()])]

    return _Captured(static, names, numbers, capture(step))


def _tensors(batch: Batch) -> list[Tensor]:
    x_compute = None if batch.x_compute is batch.x else batch.x_compute
    return [tensor for tensor in (batch.x, x_compute, batch.target) if tensor is not None]


def _on_device(number: Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.double()
    return torch.full((), number, dtype=torch.float64, device=device)


def capture_on_cuda(run: Callable[[], None]) -> Callable[[], None]:
    """Return a function that repeats, as one graph, what `run` launches.

    The thread that decodes windows keeps copying meanwhile, so only this thread's unsafe calls are refused. All
    graphs share one pool of memory: each leaves nothing there that is read after another has run.
    """
    graph, pool, stream = torch.cuda.CUDAGraph(), _pool(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
    except BaseException:
        # Where ending the capture fails too, PyTorch leaves its stream current and new memory coming from the pool.
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise
    return graph.replay


@lru_cache(maxsize=1)
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()
