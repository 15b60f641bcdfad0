"""Covariance of a hook point's training rows, in float64, mergeable; only where a store asks for it.

The matrix of a hook point costs d_in^2 multiplications a row and 8 d_in^2 bytes a shard.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64

from .moments import Moments

TILE = 64
ROWS = 24  # products of 24 x 64 by 64 are below what OpenBLAS runs in several threads, whose number would change bits


class Products:
    """Sums of products of rows' deviations from a pivot: the first chunk's mean."""

    def __init__(self, d_in: int) -> None:
        self._d_in = d_in
        n_tiles = -(-d_in // TILE)
        self._sums = np.zeros((n_tiles, n_tiles, TILE, TILE))
        self._padded = np.zeros((ROWS, n_tiles * TILE))
        self._pivot: np.ndarray | None = None

    def add(self, blocks: Iterable[Float64[np.ndarray, "n d_in"]], moments: Moments) -> None:
        """Count the rows of some blocks, whose moments are given."""
        if self._pivot is None and moments.count:
            self._pivot = moments.mean
        for block in blocks:
            for start in range(0, len(block), ROWS):
                self._add_rows(block[start : start + ROWS])

    def _add_rows(self, rows: Float64[np.ndarray, "n d_in"]) -> None:
        assert self._pivot is not None
        n, (n_tiles, *_) = len(rows), self._sums.shape
        np.subtract(rows, self._pivot, out=self._padded[:n, : self._d_in])
        tiles = self._padded[:n].reshape(n, n_tiles, TILE)
        for i in range(n_tiles):  # the upper triangle
            self._sums[i, i:] += np.matmul(tiles[:, i].T, tiles[:, i:].transpose(1, 0, 2))

    def co_moment(self, moments: Moments) -> Float64[np.ndarray, "d_in d_in"]:
        """Return the sums of products of deviations from the mean of all rows, whose moments are given."""
        wide = self._sums.transpose(0, 2, 1, 3).reshape(self._padded.shape[1], -1)[: self._d_in, : self._d_in]
        upper = np.triu(wide)
        whole = upper + np.triu(wide, 1).T
        if self._pivot is None:
            return whole
        offset = moments.mean - self._pivot
        return whole - moments.count * np.outer(offset, offset)


def merge_co_moments(
    first: Float64[np.ndarray, "d_in d_in"],
    of_first: Moments,
    other: Float64[np.ndarray, "d_in d_in"],
    of_other: Moments,
) -> Float64[np.ndarray, "d_in d_in"]:
    """Merge with the co-moment of other rows (Chan, Golub and LeVeque 1983, equations 2.1, for two variables)."""
    count = of_first.count + of_other.count
    if not of_first.count or not of_other.count:
        return first if of_first.count else other
    difference = of_other.mean - of_first.mean
    return first + other + of_first.count * of_other.count / count * np.outer(difference, difference)
