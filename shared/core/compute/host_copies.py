"""Copy a GPU's activations to the host while the next batches run: a ring of pinned buffers, and a stream of its own.

The host never waits for the whole device. The forward pass is queued on the current stream, and the copy waits for it
on a stream of its own. The host waits only for the copy of the batch that it passes on, when later batches are queued.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

SLOTS = 3
"""Batches whose activations may be on their way to the host, or in use there."""


class PendingCopy(NamedTuple):
    """The pinned tensors that a copy fills, and the event after which they are filled."""

    activations: dict[str, Tensor]
    done: Any

    def wait(self) -> dict[str, Tensor]:
        """Return the activations once the copy has ended."""
        self.done.synchronize()
        return self.activations


class HostCopies:
    """A ring of `SLOTS` pinned buffers per hook point, for activations of one device rounded to `dtype`.

    Rounding happens on the device, so that no more bytes are copied than are stored. The tensors of a copy are
    overwritten by the copy that starts `SLOTS` later. `cuda` is the module with PyTorch's streams and events.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, cuda: Any = torch.cuda) -> None:
        self._device, self._dtype, self._cuda = device, dtype, cuda
        self._stream = cuda.Stream(device)
        self._buffers: list[dict[str, Tensor]] = [{} for _ in range(SLOTS)]
        self._turn = 0

    def start(self, activations: dict[str, Tensor]) -> PendingCopy:
        """Queue the copy of activations that the current stream computes; return at once."""
        buffers = self._buffers[self._turn]
        self._turn = (self._turn + 1) % SLOTS
        rounded = {name: activation.to(self._dtype) for name, activation in activations.items()}
        self._stream.wait_stream(self._cuda.current_stream(self._device))
        copied = {}
        with self._cuda.stream(self._stream):
            for name, activation in rounded.items():
                target = self._buffer(buffers, name, activation)
                target.copy_(activation, non_blocking=True)
                activation.record_stream(self._stream)  # its memory is not given away before the copy ends
                copied[name] = target
            done = self._cuda.Event()
            done.record(self._stream)
        return PendingCopy(copied, done)

    def _buffer(self, buffers: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        found = buffers.get(name)
        if found is None or found.numel() < like.numel():
            found = buffers[name] = self._pinned(like.numel())
        return found[: like.numel()].view(like.shape)

    def _pinned(self, n: int) -> Tensor:
        return torch.empty(n, dtype=self._dtype, pin_memory=self._device.type == "cuda")
