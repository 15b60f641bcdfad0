"""The order in which a store's rows are trained on: a pure function of seed, epoch and the store's layout.

Chunks are shuffled over the whole store and cut into windows of nearly equal size. A window's order is a sequence of
strata, as many as its largest chunk has training rows, that differ in size by at most one row. A chunk's rows go to
strata in random order, no two to the same, spread evenly; in each stratum they lie in the order of the chunks, turned
by a random number of rows. Any stretch of a window then holds about as many rows of one chunk as of another, so rows of
one context, which resemble each other, rarely share a batch. And whoever puts rows in order chunk after chunk appends
to each stratum in turn, which memory does half again as fast as it takes rows in random places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

ORDER_VERSION = 2
"""Counts the orders that releases had for the same seed: a run goes on only in the one it began in."""

_CHUNKS, _ROWS, _STRATA = 0, 1, 2
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
"""Of the golden ratio, what is behind the point, in units of 2^-64: what sums are above 1 falls away by itself."""

_BLOCK_ROWS = 32 << 10
"""Rows that are ordered at once, and so part of the order: what is computed of them stays in a core's cache."""

_MAX_SHORT_BITS = 12
"""Rows of a chunk, as a power of two, up to which 32 bits are enough to draw their order."""


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
    """By a stratum's number, the place in a window of its first row, where the stratum ends, and its rows' number."""

    first: NDArray[np.int64]
    end: NDArray[np.int64]
    size: NDArray[np.int64]


def _generator(seed: int, epoch: int, purpose: int, *index: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, epoch, purpose, *index))))


def order_epoch(rows_per_chunk: NDArray[np.int64], chunks_per_window: int, seed: int, epoch: int) -> Epoch:
    """Shuffle the chunks that hold training rows and cut them into windows.

    The windows differ by at most one chunk, so that none is too small to shuffle well.
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
    """Return the place in the window's order of each of its rows, which are numbered chunk after chunk.

    `run` maps a function over blocks of chunks, in any order or at once: each has its own random numbers.
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

    Rows go to stratum after stratum by number, and round again. The strata lie in the order of multiples of the golden
    ratio: any run of numbers, such as that of a chunk with fewer rows than there are strata, is spread evenly.
    """
    by_turn = np.roll(np.argsort(np.arange(n_strata, dtype=np.uint64) * _GOLDEN_RATIO), generator.integers(n_strata))
    sizes = (n_rows - np.arange(n_strata) + n_strata - 1) // n_strata
    end = np.empty_like(sizes)
    end[by_turn] = np.cumsum(sizes[by_turn])
    return _Strata(end - generator.integers(1, sizes + 1), end, sizes)


def _place(ranks: NDArray[np.int64], strata: _Strata, out: NDArray[np.int64]) -> None:
    """Put rows' places into `out`; their ranks, the stratum's number and the rounds before it in one, are overwritten.

    Memory is used again and again here, since fresh memory costs more than what is computed in it.
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
    """Return in each line a random permutation of 0 to n - 1 of that line, and anything behind it.

    Random numbers that hold their place in the line in their lowest bits are sorted: faster than a shuffle, and the
    same on every machine. Of 4,096 rows, the most that are drawn with 32 bits, about eight pairs draw the same number
    and stay as they were.
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
