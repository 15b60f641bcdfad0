"""Copy decoded activations to a GPU while it computes: through pinned memory, on a separate stream.

Windows of an int8 store stay int8 on the GPU, with their scales, which halves the bytes to copy and to keep. Rows are
dequantised when batches gather them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, Int64
from torch import Tensor

from ..kernels import kernels_for

if TYPE_CHECKING:
    from ...shared.store import ActivationStore

_STAGING_BYTES = 64 << 20


class QuantisedRows(NamedTuple):
    """A window's rows as an int8 store holds them; `dtype` is the data type in which the store returns rows."""

    values: Int8[Tensor, "rows d_in"]
    scales: Float32[Tensor, " rows"]
    dtype: torch.dtype


WindowRows = Tensor | QuantisedRows


def take_rows(rows: WindowRows, places: Int64[Tensor, " batch"]) -> Float[Tensor, "batch d_in"]:
    """Return some of a window's rows, in the store's dtype."""
    if isinstance(rows, Tensor):
        return rows.index_select(0, places)
    # Triton launches on the current device, which may not be the batches' device.
    with torch.cuda.device_of(rows.values):
        return kernels_for(rows.values.device).dequantise(rows.values, rows.scales, places, rows.dtype)


def used_here(rows: WindowRows | Tensor) -> None:
    """Keep a window's memory from being reused until the pending work of this thread's stream has read it."""
    for tensor in (rows,) if isinstance(rows, Tensor) else (rows.values, rows.scales):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Staging:
    """Two pinned buffers through which the decoding thread copies chunks to the device.

    One is filled while the other is copied, and a buffer's copy must finish before it is filled again. Windows are
    allocated, and batches gathered, on the device's default stream. A copy starts after the work already queued there,
    because the window's memory may have belonged to another window.
    """

    def __init__(
        self,
        store: ActivationStore,
        device: torch.device,
        staging_bytes: int = _STAGING_BYTES,
        quantised: bool | None = None,
    ):
        self.store = store
        self.device = device
        self.staging_bytes = staging_bytes
        self._cuda = device.type == "cuda"
        if quantised is None:
            quantised = self._cuda and store.codec == "int8" and find_spec("triton") is not None
        self.quantised = quantised
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied: list[torch.Event | None] = [None, None]
        self._turn = 0

    def read_chunks(self, hook_point: str, chunks: Sequence[int] | np.ndarray) -> WindowRows:
        """Copy the rows of some chunks to the device and return them; only the calling thread waits."""
        store, d_in = self.store, self.store.d_in(hook_point)
        dtype = torch.int8 if self.quantised else store.dtype
        rows = torch.empty(len(chunks) * store.chunk_rows, d_in, dtype=dtype, device=self.device)
        scales = torch.empty(len(rows) if self.quantised else 0, dtype=torch.float32, device=self.device)
        self._after_training()
        chunk_bytes = store.chunk_rows * (d_in * dtype.itemsize + (4 if self.quantised else 0))
        at_once = max(1, self.staging_bytes // (len(self._buffers) * chunk_bytes))
        for first in range(0, len(chunks), at_once):
            part = chunks[first : first + at_once]
            place = slice(first * store.chunk_rows, (first + len(part)) * store.chunk_rows)
            staged = self._next_buffer(len(part) * chunk_bytes)
            n_bytes = scales[place].nbytes  # the scales come first, so that they are aligned
            values = staged[n_bytes:].view(dtype).view(-1, d_in)
            if self.quantised:
                of_rows = staged[:n_bytes].view(torch.float32)
                store.read_quantised(hook_point, part, values, of_rows)
                self._copy((rows[place], values), (scales[place], of_rows))
            else:
                store.read_chunks(hook_point, part, values)
                self._copy((rows[place], values))
        self._finish()
        return QuantisedRows(rows, scales, store.dtype) if self.quantised else rows

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the device, wait for the copy, and return it."""
        target = torch.empty_like(tensor, device=self.device)
        self._after_training()
        staged = self._next_buffer(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        staged.copy_(tensor)
        self._copy((target, staged))
        self._finish()
        return target

    def _after_training(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self.device))

    def _next_buffer(self, n_bytes: int) -> Tensor:
        """Switch to the other buffer and return it, once its last copy has finished."""
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        if len(self._buffers[self._turn]) < n_bytes:
            self._buffers[self._turn] = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._cuda)
        return self._buffers[self._turn][:n_bytes]

    def _copy(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Start to copy from the current buffer."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for target, source in pairs:
                target.copy_(source, non_blocking=self._cuda)
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(self._stream)
            self._copied[self._turn] = event

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
