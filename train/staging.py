"""Bring decoded activations to a GPU while it computes: read into pinned memory, copy on a stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from ..shared.store import ActivationStore

_STAGING_BYTES = 64 << 20


class Staging:
    """One pinned buffer, through which the thread that decodes windows sends their chunks to the device."""

    def __init__(self, store: ActivationStore, device: torch.device, staging_bytes: int = _STAGING_BYTES):
        self.store = store
        self.device = device
        self.staging_bytes = staging_bytes
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffer: Tensor | None = None

    def read_chunks(self, hook_point: str, chunks: Sequence[int] | np.ndarray) -> Float[Tensor, "rows d_in"]:
        """Return chunks' rows on the device, there in full; only the calling thread waits."""
        store, d_in = self.store, self.store.d_in(hook_point)
        rows = torch.empty(len(chunks) * store.chunk_rows, d_in, dtype=store.dtype, device=self.device)
        if self._stream is not None:
            # The memory may have been another window's, which the stream that trains still reads.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        at_once = max(1, self.staging_bytes // (store.chunk_rows * d_in * store.dtype.itemsize))
        for first in range(0, len(chunks), at_once):
            part = chunks[first : first + at_once]
            staged = self._staged(len(part) * store.chunk_rows, d_in)
            store.read_chunks(hook_point, part, staged)
            start = first * store.chunk_rows
            self._copy(rows[start : start + len(staged)], staged)
        return rows

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor on the device, there in full."""
        target = torch.empty_like(tensor, device=self.device)
        self._copy(target, tensor.pin_memory() if self._cuda else tensor)
        return target

    def _staged(self, n_rows: int, d_in: int) -> Tensor:
        n_bytes = n_rows * d_in * self.store.dtype.itemsize
        if self._buffer is None or len(self._buffer) < n_bytes:
            self._buffer = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._cuda)
        return self._buffer[:n_bytes].view(self.store.dtype).view(n_rows, d_in)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            target.copy_(source, non_blocking=self._cuda)
        if self._stream is not None:
            self._stream.synchronize()
