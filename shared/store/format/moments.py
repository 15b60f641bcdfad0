"""Mean, variance and mean norm of a hook point's training rows, in float64, mergeable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Float64

SINGLE_THREADED_DOT = 8192


@dataclass(frozen=True)
class Moments:
    """Exact moments of rows: `M2` is the sum of squared deviations from the mean, `sum_norm` of Euclidean norms."""

    count: int
    mean: Float64[np.ndarray, " d_in"]
    M2: Float64[np.ndarray, " d_in"]
    sum_norm: float

    @classmethod
    def none(cls, d_in: int) -> Moments:
        """Return the moments of no rows."""
        return cls(0, np.zeros(d_in), np.zeros(d_in), 0.0)

    @classmethod
    def of(cls, blocks: Iterable[Float64[np.ndarray, "n d_in"]], d_in: int) -> Moments:
        """Return the moments of all rows of some blocks of rows. The blocks are overwritten.

        One pass over deviations from a pivot, the first block's mean. As the rows that made it are among those
        counted, its distance from the mean of `count` rows is at most sqrt(count) standard deviations, and what the
        last subtraction cancels at most a factor `count`. No BLAS where its bits change with the number of threads.
        """
        count, sum_norm = 0, 0.0
        pivot, total, squares = np.zeros(d_in), np.zeros(d_in), np.zeros(d_in)
        for rows in blocks:
            if not len(rows):
                continue
            sum_norm += float(np.sqrt(_squared_norms(rows)).sum())
            if not count:
                pivot = rows.mean(axis=0)
            count += len(rows)
            rows -= pivot
            total += rows.sum(axis=0)
            squares += np.einsum("ij,ij->j", rows, rows)
        if not count:
            return cls.none(d_in)
        offset = total / count
        return cls(count, pivot + offset, np.maximum(squares - offset * total, 0.0), sum_norm)

    def __add__(self, other: Moments) -> Moments:
        """Merge with the moments of other rows (Chan, Golub and LeVeque 1983, equations 2.1)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if not other.count else other
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        M2 = self.M2 + other.M2 + difference * difference * (self.count * other.count / count)
        return Moments(count, mean, M2, self.sum_norm + other.sum_norm)

    @property
    def variance(self) -> Float64[np.ndarray, " d_in"]:
        """Population variance of each channel."""
        return self.M2 / max(self.count, 1)

    @property
    def total_variance(self) -> float:
        """E||x - E x||^2, the sum of the channels' variances."""
        return float(self.variance.sum())

    @property
    def mean_norm(self) -> float:
        """E||x||."""
        return self.sum_norm / max(self.count, 1)


def _squared_norms(rows: Float64[np.ndarray, "n d_in"]) -> Float64[np.ndarray, " n"]:
    """Return each row's squared norm by the BLAS's dot product, which runs in one thread up to 10,000 values."""
    if rows.shape[1] <= SINGLE_THREADED_DOT:
        return np.vecdot(rows, rows)
    return np.einsum("ij,ij->i", rows, rows)


def merge_moments(parts: Iterable[Moments], d_in: int) -> Moments:
    """Merge moments in order; the same parts in the same order give the same bits."""
    return reduce(Moments.__add__, parts, Moments.none(d_in))
