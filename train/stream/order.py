"""The order in which a store's rows are trained on: a pure function of seed, epoch and the store's layout.

Chunks are shuffled over the whole store and cut into windows of nearly equal size. A window is a sequence of strata, as
many as its largest chunk has training rows; their sizes differ by at most one row. A chunk's rows are assigned to
different strata, in random order and evenly spaced. Within a stratum, rows are in the order of their chunks, rotated by
a random number of rows. Any part of a window then contains about as many rows of each chunk, so rows of the same
context, which are similar, rarely share a batch. Writing rows in order, chunk by chunk, appends to each stratum in
turn, which takes two thirds of the time of writing to random positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

ORDER_VERSION = 2
"""Increased whenever the same seed gives another order: a run can only resume with the version it began with."""

_CHUNKS, _ROWS, _STRATA = 0, 1, 2
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
"""Fractional part of the golden ratio times 2^64; unsigned overflow keeps sums in [0, 1)."""

_BLOCK_ROWS = 32 << 10
"""Rows that are ordered at a time, few enough to stay in a core's cache. The order depends on this number."""

_MAX_SHORT_BITS = 12
"""Largest rows per chunk, as a power of two, for which 32-bit random numbers suffice to draw their order."""


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


class _Strata(NamedTuple):
    """For each stratum: the position in the window of its first row, its end, and its number of rows."""

    first: NDArray[np.int64]
    end: NDArray[np.int64]
    size: NDArray[np.int64]


def _generator(seed: int, epoch: int, purpose: int, *index: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, epoch, purpose, *index))))


def order_epoch(rows_per_chunk: NDArray[np.int64], chunks_per_window: int, seed: int, epoch: int) -> Epoch:
    """Shuffle the chunks that hold training rows and cut them into windows.

    Their sizes differ by at most one chunk, so that no window is too small to shuffle well.
    """
    chunks = _generator(seed, epoch, _CHUNKS).permutation(np.flatnonzero(rows_per_chunk))
    n_windows = max(1, -(-len(chunks) // chunks_per_window))
    chunk_starts = np.arange(n_windows + 1, dtype=np.int64) * len(chunks) // n_windows
    rows_before = np.concatenate([[0], np.cumsum(rows_per_chunk[chunks])])
    return Epoch(chunks, chunk_starts, rows_before[chunk_starts])


def place_window(
    rows_in_chunks: Int64[np.ndarray, " chunks"],
    seed: int,
    epoch: int,
    window: int,
    run: Callable[[Callable[[int], None], Iterable[int]], Iterable[None]] = map,
) -> Int64[np.ndarray, " rows"]:
    """Return the position in the window of each of its rows, which are numbered chunk by chunk.

    `run` maps a function over blocks of chunks, in any order or in parallel: each block has its own random numbers.
    """
    n_rows, n_strata = int(rows_in_chunks.sum()), int(rows_in_chunks.max())
    starts = np.cumsum(rows_in_chunks) - rows_in_chunks
    strata = _strata(n_rows, n_strata, _generator(seed, epoch, _STRATA, window))
    places = np.empty(n_rows, dtype=np.int64)
    at_once = max(1, _BLOCK_ROWS // n_strata)

    def place_block(block: int) -> None:
        chunks = slice(block * at_once, (block + 1) * at_once)
        n, start = rows_in_chunks[chunks], starts[chunks]
        ranks = _permutations(n, _generator(seed, epoch, _ROWS, window, block))
        ranks += start[:, None]
        if n.min() < ranks.shape[1]:
            ranks = ranks[np.arange(ranks.shape[1]) < n[:, None]]
        _place(ranks.reshape(-1), strata, places[start[0] : start[-1] + n[-1]])

    for _ in run(place_block, range(-(-len(starts) // at_once))):
        pass
    return places


def _strata(n_rows: int, n_strata: int, generator: np.random.Generator) -> _Strata:
    """Lay out a window's strata.

    Rows are assigned to the strata cyclically by number. The strata are arranged by the fractional parts of multiples
    of the golden ratio, so that any range of consecutive numbers, such as the rows of a chunk with fewer rows than
    there are strata, is evenly spaced.
    """
    by_turn = np.roll(np.argsort(np.arange(n_strata, dtype=np.uint64) * _GOLDEN_RATIO), generator.integers(n_strata))
    sizes = (n_rows - np.arange(n_strata) + n_strata - 1) // n_strata
    end = np.empty_like(sizes)
    end[by_turn] = np.cumsum(sizes[by_turn])
    return _Strata(end - generator.integers(1, sizes + 1), end, sizes)


def _place(ranks: NDArray[np.int64], strata: _Strata, out: NDArray[np.int64]) -> None:
    """Write the rows' positions to `out`; their ranks, which combine stratum and round, are overwritten.

    Buffers are reused here, because allocating new memory costs more than the computation.
    """
    n_strata = len(strata.size)
    rounds = ranks // n_strata
    np.multiply(rounds, n_strata, out=out)
    ranks -= out
    np.take(strata.first, ranks, out=out, mode="clip")
    out += rounds
    beyond = out >= np.take(strata.end, ranks, out=rounds, mode="clip")
    np.subtract(out, np.take(strata.size, ranks, out=rounds, mode="clip"), out=out, where=beyond)


def _permutations(n: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Return in each line a random permutation of 0 to n - 1 for that line's n; the entries after it are undefined.

    Sorts random numbers that hold their index in the lowest bits, which is faster than a shuffle and gives the same
    result on every machine. Among 4,096 rows, the most that are drawn with 32 bits, about eight pairs draw the same
    number and keep their relative order.
    """
    width = int(n.max())
    bits = max(1, (width - 1).bit_length())
    dtype = np.dtype(np.uint32 if bits <= _MAX_SHORT_BITS else np.uint64)
    size = len(n) * width
    drawn = generator.integers(0, 1 << 64, -(-size * dtype.itemsize // 8), dtype=np.uint64)
    numbers = drawn.view(dtype)[:size].reshape(-1, width)
    numbers <<= bits
    numbers |= np.arange(width, dtype=dtype)
    if n.min() < width:
        numbers[np.arange(width) >= n[:, None]] = np.iinfo(dtype).max
    numbers.sort(axis=1)
    numbers &= (1 << bits) - 1
    return numbers.astype(np.int64)


def epoch_and_row(position: int, rows_per_epoch: int) -> tuple[int, int]:
    """Return the epoch of a stream position and the row within that epoch."""
    return divmod(position, rows_per_epoch)
