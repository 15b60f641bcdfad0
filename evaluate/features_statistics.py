"""What one pass counts of every latent: firings, a histogram of its activations, what fires with it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64

from .features_sparse import ActiveLatents

N_BINS = 64


class ActivationStatistics:
    """Firings, mean, maximum and histogram of every latent's activations.

    A histogram spans [0, 2**exponent) in `N_BINS` bins. When an activation lies beyond, pairs of
    bins merge and the span doubles: counts stay exact though the maximum is not known beforehand.
    """

    def __init__(self, d_sae: int):
        self.n_rows = 0
        self.firings = np.zeros(d_sae, dtype=np.int64)
        self.total = np.zeros(d_sae)
        self.maximum = np.zeros(d_sae, dtype=np.float32)
        self.exponent = np.full(d_sae, np.iinfo(np.int32).min, dtype=np.int32)
        self.counts = np.zeros((d_sae, N_BINS), dtype=np.int32)

    def add(self, block: ActiveLatents, n_rows: int) -> None:
        """Count a block's entries."""
        self.n_rows += n_rows
        latent, value = block.latent, block.value
        self.firings += np.bincount(latent, minlength=len(self.firings))
        self.total += np.bincount(latent, weights=value, minlength=len(self.firings))
        np.maximum.at(self.maximum, latent, value)
        self._widen()
        bins = (np.ldexp(value, -self.exponent[latent]) * N_BINS).astype(np.int64)
        np.add.at(self.counts.reshape(-1), latent * N_BINS + bins, 1)

    def _widen(self) -> None:
        needed = np.frexp(self.maximum)[1].astype(np.int32)
        needed[self.maximum == 0] = np.iinfo(np.int32).min
        empty = self.exponent == np.iinfo(np.int32).min
        self.exponent[empty] = needed[empty]
        while len(narrow := np.flatnonzero(needed > self.exponent)):
            self.counts[narrow, : N_BINS // 2] = self.counts[narrow].reshape(-1, N_BINS // 2, 2).sum(axis=2)
            self.counts[narrow, N_BINS // 2 :] = 0
            self.exponent[narrow] += 1

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """The share of rows on which each latent fires."""
        return self.firings / max(self.n_rows, 1)

    @property
    def mean(self) -> Float[np.ndarray, " d_sae"]:
        """The mean activation where the latent fires, zero where it never does."""
        return self.total / np.maximum(self.firings, 1)


class CoFiring:
    """How often pairs of latents fire on the same token, over a sample of rows that `max_pairs` bounds."""

    def __init__(self, d_sae: int, total_rows: int, max_pairs: int = 1 << 25):
        self.d_sae = d_sae
        self.firings = np.zeros(d_sae, dtype=np.int64)
        self._pairs_per_row = max_pairs / max(total_rows, 1)
        self._allowance = 0.0
        self._keys = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, block: ActiveLatents, n_rows: int) -> None:
        """Count the pairs on as many of a block's rows, evenly spaced, as the allowance covers."""
        self._allowance += self._pairs_per_row * n_rows
        _, first, count = np.unique(block.row, return_index=True, return_counts=True)
        cost = float((count.astype(np.float64) ** 2).sum())
        if not cost:
            return
        n_taken = int(len(first) * min(1.0, self._allowance / cost))
        taken = np.arange(n_taken) * len(first) // max(n_taken, 1)
        first, count = first[taken], count[taken]
        self._allowance -= float((count.astype(np.float64) ** 2).sum())
        entries = _ranges(first, count)
        self.firings += np.bincount(block.latent[entries], minlength=self.d_sae)
        left = np.repeat(entries, np.repeat(count, count))
        right = _ranges(np.repeat(first, count), np.repeat(count, count))
        keys, counts = np.unique(block.latent[left] * self.d_sae + block.latent[right], return_counts=True)
        self._merge(keys, counts)

    def _merge(self, keys: np.ndarray, counts: np.ndarray) -> None:
        both = np.concatenate([self._keys, keys])
        self._keys, inverse = np.unique(both, return_inverse=True)
        self._counts = np.bincount(inverse, weights=np.concatenate([self._counts, counts])).astype(np.int64)

    def neighbours(
        self, n: int, min_count: int = 2
    ) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
        """Return (latent, neighbour, score), each latent's `n` best in order.

        The score is the cosine of the two latents' firing indicators: firings together over the
        geometric mean of firings.
        """
        a, b = np.divmod(self._keys, self.d_sae)
        useful = (a != b) & (self._counts >= min_count)
        a, b, together = a[useful], b[useful], self._counts[useful]
        score = together / np.sqrt(self.firings[a] * self.firings[b].astype(np.float64))
        order = np.lexsort((b, -score, a))
        a, b, score = a[order], b[order], score[order]
        rank = np.arange(len(a)) - np.searchsorted(a, a)
        return a[rank < n], b[rank < n], score[rank < n]


def _ranges(first: np.ndarray, count: np.ndarray) -> Int64[np.ndarray, " total"]:
    """Return first[0], ..., first[0] + count[0] - 1, first[1], ... joined."""
    starts = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(first - starts, count)
