"""Steps replayed as CUDA graphs: once shapes have settled, the host launches one graph instead of a hundred kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..architectures.contract import Batch, Number

_log = logging.getLogger(__name__)

_EAGER_STEPS = 3
_MOST_GRAPHS = 4

RunStep = Callable[[Batch], dict[str, Number]]
Capture = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True)
class _Captured:
    batch: Batch
    names: list[str]
    numbers: list[Tensor]
    replay: Callable[[], None]


class StepGraphs:
    """Runs a step normally until its key has been the same for three steps, and then as a captured graph.

    The key contains everything that determines a step's launches: its shapes, and whatever else the host decides. All
    that changes between steps besides the batch must be read from the device, and state must be changed in place. The
    steps before the capture compile the kernels. If `capture` is None, steps are never captured.
    """

    def __init__(self, capture: Capture | None):
        self._capture = capture
        self._graphs: dict[Hashable, _Captured] = {}
        self._key: Hashable = None
        self._steps_alike = 0

    def __call__(self, run: RunStep, batch: Batch, key: Hashable | None) -> dict[str, Number]:
        """Take a step with `run` and return its metrics, which later steps do not change.

        A key of None is never captured. If a capture fails, this and later steps run normally, and raise errors that
        were not caused by the capture.
        """
        if key not in self._graphs and (self._capture is None or key is None or not self._settled(key)):
            return run(batch)
        if key not in self._graphs:
            try:
                self._graphs[key] = _capture_step(run, batch, self._capture)
            except Exception as error:  # Triton's errors are not RuntimeErrors
                self._capture = None
                _log.warning(f"steps are not captured in a CUDA graph: {error}"[:300])
                return run(batch)
            for old in list(self._graphs)[:-_MOST_GRAPHS]:
                del self._graphs[old]
        captured = self._graphs[key]
        for static, tensor in zip(_tensors(captured.batch), _tensors(batch), strict=True):
            static.copy_(tensor)
        captured.replay()
        return dict(zip(captured.names, captured.numbers[0].clone().unbind(), strict=True))

    def _settled(self, key: Hashable) -> bool:
        """Return whether enough steps with this key have run to compile everything that they need."""
        self._steps_alike = self._steps_alike + 1 if key == self._key else 0
        self._key = key
        return self._steps_alike >= _EAGER_STEPS


def _capture_step(run: RunStep, batch: Batch, capture: Capture | None) -> _Captured:
    assert capture is not None
    x = torch.empty_like(batch.x)
    x_compute = x if batch.x_compute is batch.x else torch.empty_like(batch.x_compute)
    others = [None if one is None else torch.empty_like(one) for one in (batch.target, batch.row_weights)]
    static = Batch(x, x_compute, *others)
    names: list[str] = []
    numbers: list[Tensor] = []

    def step() -> None:
        found = run(static)
        names[:] = found
        numbers[:] = [torch.stack([_on_device(value, batch.x.device) for value in found.values()])]

    return _Captured(static, names, numbers, capture(step))


def _tensors(batch: Batch) -> list[Tensor]:
    x_compute = None if batch.x_compute is batch.x else batch.x_compute
    return [one for one in (batch.x, x_compute, batch.target, batch.row_weights) if one is not None]


def _on_device(number: Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.double()
    return torch.full((), number, dtype=torch.float64, device=device)


def capture_on_cuda(run: Callable[[], None]) -> Callable[[], None]:
    """Capture what `run` launches, and return a function that replays it as one graph.

    The decoding thread continues to copy during the capture, so only this thread's unsafe calls are refused. All graphs
    share one memory pool, because no graph leaves anything in it that is read after another graph has run.
    """
    graph, pool, stream = torch.cuda.CUDAGraph(), _pool(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
    except BaseException:
        # If ending the capture fails too, PyTorch leaves its stream current and keeps allocating from the pool.
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise
    return graph.replay


@lru_cache(maxsize=1)
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()
