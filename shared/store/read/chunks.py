"""Decode chunks of a store's arrays in parallel: activations in order or at given destinations, tokens and roles."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, Int64
from torch import Tensor

from ...core.errors import ConfigError
from ..format.bits import TORCH_DTYPES
from ..format.codecs import dequantise_rows
from ..format.layout import arrays_of, scales_name
from ..format.manifest import Manifest
from ..local.store_files import StoreFiles

Verify = Literal["first", "always", "never"]
_MAX_PIECE_BYTES, _MIN_PIECE_BYTES = 512, 128


class ChunkReader:
    """The arrays of a store, decoded chunk by chunk; `verify` says when a chunk's checksum is checked.

    Safe to use from several threads, and after a fork: each process has a pool of `threads` threads.
    """

    def __init__(self, files: StoreFiles, manifest: Manifest, verify: Verify, threads: int) -> None:
        self.caches = {array.name: files.shard_cache(array, manifest) for array in arrays_of(manifest.header)}
        self._chunk_rows = manifest.header.chunk_rows
        self._dtype = TORCH_DTYPES[manifest.header.dtype]
        self._is_int8 = manifest.header.codec == "int8"
        self._verify = verify
        self._threads = threads
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def decode(
        self, hook_point: str, indices: Int64[np.ndarray, " n"], out: Float[Tensor, "rows d_in"] | None, d_in: int
    ) -> Float[Tensor, "rows d_in"]:
        """Decode chunks one after another into `out`, which is allocated if not given."""
        self._prepare(hook_point, indices)  # it checks the files' sizes, before memory is allocated for their content
        shape = (len(indices) * self._chunk_rows, d_in)
        if out is None:
            with torch.inference_mode(False):  # other threads, which are in no such mode, fill it
                out = torch.empty(shape, dtype=self._dtype)
        elif not self._fits(out, shape):
            raise ConfigError(
                f"expected a contiguous {self._dtype} CPU tensor of shape {shape} to decode into, "
                f"got {out.dtype} on {out.device} of shape {tuple(out.shape)}"
            )
        rows = self._chunk_rows
        if self._is_int8:
            self._parallel(
                lambda i: self._dequantise(hook_point, int(indices[i]), out[i * rows : (i + 1) * rows]), len(indices)
            )
        elif len(indices):
            target = out.view(torch.uint8).numpy().reshape(len(indices), -1)
            cache = self.caches[hook_point]
            self._parallel(lambda i: cache.decode(int(indices[i]), target[i], self._verify), len(indices))
        return out

    def place_rows(
        self,
        hook_point: str,
        indices: Int64[np.ndarray, " n"],
        destinations: Int64[np.ndarray, " rows"],
        out: Float[Tensor, "n_out d_in"],
        d_in: int,
    ) -> None:
        """Decode chunks and write row `i` to `out[destinations[i]]`; see `ActivationStore.place_rows`."""
        n = len(indices) * self._chunk_rows
        least, most = (int(destinations.min()), int(destinations.max())) if destinations.size else (-1, -1)
        if destinations.shape != (n,) or not -1 <= least <= most < len(out):
            raise ConfigError(
                f"destinations must hold {n} numbers from -1 to {len(out) - 1}; "
                f"got {destinations.size} numbers from {least} to {most}"
            )
        if not self._fits(out, (len(out), d_in)):
            raise ConfigError(f"expected a contiguous {self._dtype} CPU tensor of width {d_in} to put rows into")
        self._prepare(hook_point, indices)
        row_bytes = d_in * self._dtype.itemsize
        piece = np.dtype((np.void, _piece_bytes(row_bytes)))
        pieces = np.arange(row_bytes // piece.itemsize)
        target = out.view(torch.uint8).numpy().reshape(-1).view(piece)
        scratch = threading.local()

        def place(i: int) -> None:
            if not hasattr(scratch, "rows"):
                scratch.rows = torch.empty(self._chunk_rows, d_in, dtype=self._dtype)
            rows = scratch.rows.view(torch.uint8).numpy().reshape(-1)
            if self._is_int8:
                self._dequantise(hook_point, int(indices[i]), scratch.rows)
            else:
                rows = self.caches[hook_point].view(int(indices[i]), rows, self._verify)
            wanted = destinations[i * self._chunk_rows : (i + 1) * self._chunk_rows]
            if len(pieces) > 1:
                wanted = (wanted[:, None] * len(pieces) + pieces).reshape(-1)
            target[wanted] = rows.view(piece)

        if len(indices):
            self._parallel(place, len(indices))

    def read_quantised(
        self,
        hook_point: str,
        indices: Int64[np.ndarray, " n"],
        values: Int8[Tensor, "rows d_in"],
        scales: Float32[Tensor, " rows"],
    ) -> None:
        """Decode chunks of an int8 store without dequantising them."""
        self._prepare(hook_point, indices)
        values_out = values.view(torch.uint8).numpy().reshape(len(indices), -1)
        scales_out = scales.view(torch.uint8).numpy().reshape(len(indices), -1)
        values_of, scales_of = self.caches[hook_point], self.caches[scales_name(hook_point)]

        def decode(i: int) -> None:
            values_of.decode(int(indices[i]), values_out[i], self._verify)
            scales_of.decode(int(indices[i]), scales_out[i], self._verify)

        if len(indices):
            self._parallel(decode, len(indices))

    def integers(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the tokens or the roles."""
        cache = self.caches[name]
        rows = cache.array.chunk_rows
        first, last = start // rows, -(-stop // rows)
        cache.prepare(np.arange(first, last))
        out = np.empty((last - first, rows), dtype=np.dtype(cache.array.dtype).newbyteorder("<"))
        self._parallel(lambda i: cache.decode(first + i, out[i].view(np.uint8), self._verify), last - first)
        return torch.from_numpy(out.reshape(-1)[start - first * rows : stop - first * rows])

    def _prepare(self, hook_point: str, indices: np.ndarray) -> None:
        for name in (hook_point, scales_name(hook_point)) if self._is_int8 else (hook_point,):
            self.caches[name].prepare(indices)

    def _dequantise(self, hook_point: str, chunk: int, out: Tensor) -> None:
        values = np.empty(out.shape, dtype=np.int8)
        scales = np.empty(len(out), dtype=np.float32)
        self.caches[hook_point].decode(chunk, values.reshape(-1).view(np.uint8), self._verify)
        self.caches[scales_name(hook_point)].decode(chunk, scales.view(np.uint8), self._verify)
        out.copy_(torch.from_numpy(dequantise_rows(values, scales)))

    def _fits(self, out: Tensor, shape: tuple[int, int]) -> bool:
        is_ours = out.dtype == self._dtype and out.is_contiguous() and out.device.type == "cpu"
        return is_ours and tuple(out.shape) == shape

    def _parallel(self, work: Callable[[int], None], n: int) -> None:
        """Run work(0) to work(n - 1) in this process's threads."""
        pool = self._pools.get(os.getpid())
        if pool is None:
            pool = self._pools.setdefault(os.getpid(), ThreadPoolExecutor(self._threads, "store-decode"))
        parts = min(n, self._threads)
        futures = [pool.submit(_run, work, n * i // parts, n * (i + 1) // parts) for i in range(parts)]
        for future in futures:
            future.result()


def _run(work: Callable[[int], None], start: int, stop: int) -> None:
    for i in range(start, stop):
        work(i)


def _piece_bytes(row_bytes: int) -> int:
    """Return the size of the equal pieces in which NumPy scatters rows fastest.

    glibc copies up to 512 bytes without a loop. And NumPy releases the interpreter lock only while it scatters more
    than 500 elements: a chunk of 256 KiB has fewer rows than that if they are wide, but enough pieces.
    """
    for n_pieces in range(-(-row_bytes // _MAX_PIECE_BYTES), row_bytes // _MIN_PIECE_BYTES + 1):
        if row_bytes % n_pieces == 0:
            return row_bytes // n_pieces
    return row_bytes
