"""The order in which a store's rows are trained on: a pure function of seed, epoch and the store's layout.

Chunks are shuffled over the whole store and cut into windows of nearly equal size. Within a window rows
are ordered by a key that spreads each chunk's rows evenly, at random places: row j of a chunk of n
gets `(permutation[j] + uniform) / n`. Any stretch of a window then holds about as many rows of one
chunk as of another, so rows of one context, which resemble each other, rarely share a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_CHUNKS, _ROWS = 0, 1


class Place(NamedTuple):
    """Where in the stream a row is."""

    epoch: int
    window: int
    row: int


class Epoch(NamedTuple):
    """One epoch's chunks in order, and where its windows begin in chunks and in rows."""

    chunks: NDArray[np.int64]
    chunk_starts: NDArray[np.int64]
    row_starts: NDArray[np.int64]

    def window(self, index: int) -> NDArray[np.int64]:
        """Return the chunks of one window, in order."""
        return self.chunks[self.chunk_starts[index] : self.chunk_starts[index + 1]]

    @property
    def n_windows(self) -> int:
        """Return the number of windows."""
        return len(self.chunk_starts) - 1


def _generator(seed: int, epoch: int, purpose: int, index: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, purpose, index))))


def order_epoch(rows_per_chunk: NDArray[np.int64], chunks_per_window: int, seed: int, epoch: int) -> Epoch:
    """Shuffle the chunks that hold training rows and cut them into windows.

    The windows differ by at most one chunk, so that none is too small to shuffle well.
    """
    chunks = _generator(seed, epoch, _CHUNKS).permutation(np.flatnonzero(rows_per_chunk))
    n_windows = max(1, -(-len(chunks) // chunks_per_window))
    chunk_starts = np.arange(n_windows + 1, dtype=np.int64) * len(chunks) // n_windows
    rows_before = np.concatenate([[0], np.cumsum(rows_per_chunk[chunks])])
    return Epoch(chunks, chunk_starts, rows_before[chunk_starts])


def order_window(rows_in_chunks: NDArray[np.int64], seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """Return a permutation of a window's rows, which are numbered chunk after chunk."""
    generator = _generator(seed, epoch, _ROWS, window)
    n_rows = int(rows_in_chunks.sum())
    starts = np.cumsum(rows_in_chunks) - rows_in_chunks
    keys = np.empty(n_rows)
    for n in np.unique(rows_in_chunks).tolist():
        chunks = np.flatnonzero(rows_in_chunks == n)
        strata = generator.permuted(np.broadcast_to(np.arange(n, dtype=np.float64), (len(chunks), n)), axis=1)
        strata += generator.random(strata.shape)
        strata *= 1 / n if n else 0
        keys[starts[chunks, None] + np.arange(n)] = strata
    # The row's number in the lowest bits makes numbers that differ and tell the row: sorting them is three times as
    # fast as finding the order that sorts the keys, and gives the same on every machine.
    bits = max(1, int(n_rows - 1).bit_length())
    packed = (keys * 2.0 ** (62 - bits)).astype(np.int64) << bits
    packed |= np.arange(n_rows)
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


def locate(position: int, rows_per_epoch: int) -> tuple[int, int]:
    """Return the epoch of a stream position and the row within that epoch."""
    return divmod(position, rows_per_epoch)
