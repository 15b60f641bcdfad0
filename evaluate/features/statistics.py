"""Per-latent counts: firings, a histogram of activations, and which latents fire together."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64

from .sparse import ActiveLatents, runs

N_BINS = 64
MERGE_PAIRS = 1 << 23
TABLE_ROWS = 256


class ActivationStatistics:
    """Firings, mean, maximum and histogram of every latent's activations.

    A histogram covers [0, 2**exponent) in `N_BINS` bins. For an activation beyond that range, pairs of bins are merged
    and the range doubles. The counts stay exact although the maximum is not known in advance.
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

    def density_of(self, latents: slice) -> Float[np.ndarray, " latents"]:
        """Return the share of rows on which each of these latents fires."""
        return self.firings[latents] / max(self.n_rows, 1)

    def mean_of(self, latents: slice) -> Float[np.ndarray, " latents"]:
        """Return the mean activation of each of these latents when it fires; zero if it never fires."""
        return self.total[latents] / np.maximum(self.firings[latents], 1)


class CoFiring:
    """How often pairs of latents fire on the same token, counted on a sample of rows that `max_pairs` limits.

    If a table of all pairs has at most `max_pairs` cells, pairs are counted in that table; otherwise in a sorted list
    of the pairs that occur.
    """

    def __init__(self, d_sae: int, total_rows: int, max_pairs: int = 1 << 24):
        self.d_sae = d_sae
        self.firings = np.zeros(d_sae, dtype=np.int64)
        self._pairs_per_row = max_pairs / max(total_rows, 1)
        self._allowance = 0.0
        self._waiting: list[np.ndarray] = []
        self._tabled = d_sae * d_sae <= max_pairs
        self._keys = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(d_sae * d_sae, dtype=np.int32) if self._tabled else np.zeros(0, dtype=np.int64)

    def add(self, block: ActiveLatents, n_rows: int) -> None:
        """Count the pairs on a random sample of the block's rows, as many as the allowance covers.

        The block's first row seeds the sample. Evenly spaced rows would cover only a few positions of the contexts, or
        only the first.
        """
        self._allowance += self._pairs_per_row * n_rows
        first, count = runs(block.row - block.first_row)
        cost = (count * (count - 1) / 2).sum()
        share = min(1.0, self._allowance / cost) if cost else 1.0
        n_taken = max(0, int(len(first) * share))
        taken = np.sort(np.random.default_rng(block.first_row).permutation(len(first))[:n_taken])
        first, count = first[taken], count[taken]
        self._allowance -= (count * (count - 1) / 2).sum()
        entries = _ranges(first, count)
        self.firings += np.bincount(block.latent[entries], minlength=self.d_sae)
        following = np.repeat(first + count, count) - entries - 1
        left, right = np.repeat(entries, following), _ranges(entries + 1, following)
        self._waiting.append(block.latent[left] * self.d_sae + block.latent[right])
        if sum(map(len, self._waiting)) > MERGE_PAIRS:
            self.merge()

    def merge(self) -> None:
        """Add the waiting pairs to the counts. In each pair, the latent with the lower number comes first."""
        if self._tabled:
            for keys in self._waiting:
                self._counts += np.bincount(keys, minlength=len(self._counts)).astype(np.int32)
            self._waiting = []
            return
        new = np.sort(np.concatenate([self._keys[:0], *self._waiting]))
        self._waiting = []
        first, count = runs(new)
        keys = np.concatenate([self._keys, new[first]])
        counts = np.concatenate([self._counts, count])
        order = np.argsort(keys)
        first, _ = runs(keys[order])
        self._keys = keys[order][first]
        self._counts = np.add.reduceat(counts[order], first) if len(first) else counts

    def neighbours(
        self, n: int, min_count: int = 2
    ) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
        """Return (latent, neighbour, score) for each latent's `n` best neighbours, best first.

        The score is the cosine of the two latents' firing indicators: the number of rows on which both fire, divided by
        the geometric mean of their firings.
        """
        self.merge()
        if self._tabled:
            return self._from_table(n, min_count)
        useful = self._counts >= min_count
        low, high = np.divmod(self._keys[useful], self.d_sae)
        score = self._counts[useful] / np.sqrt(self.firings[low] * self.firings[high].astype(np.float64))
        a, b, score = np.concatenate([low, high]), np.concatenate([high, low]), np.concatenate([score, score])
        order = np.argsort((a << 32) | _descending(score))
        a, b, score = a[order], b[order], score[order]
        first, count = runs(a)
        rank = np.arange(len(a)) - np.repeat(first, count)
        return a[rank < n], b[rank < n], score[rank < n]

    def _from_table(self, n: int, min_count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = self._counts.reshape(self.d_sae, self.d_sae)
        n, scale = min(n, self.d_sae), 1 / np.sqrt(np.maximum(self.firings, 1))
        parts = []
        for start in range(0, self.d_sae, TABLE_ROWS):
            rows = slice(start, start + TABLE_ROWS)
            together = table[rows] + table[:, rows].T
            score = np.where(together >= min_count, together * scale[rows, None] * scale, 0)
            best = np.partition((_descending(score) << 32) | np.arange(self.d_sae), n - 1, axis=1)[:, :n]
            best.sort(axis=1)
            neighbour = best & 0xFFFFFFFF
            parts.append((neighbour, np.take_along_axis(score, neighbour, axis=1)))
        neighbour, score = (np.concatenate(column) for column in zip(*parts, strict=True))
        latent, rank = np.nonzero(score)
        return latent, neighbour[latent, rank], score[latent, rank]


def _descending(score: Float[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
    """Map nonnegative scores to integers that sort in descending order; such floats sort like their bits."""
    return (1 << 30) - score.astype(np.float32).view(np.uint32).astype(np.int64)


def _ranges(first: np.ndarray, count: np.ndarray) -> Int64[np.ndarray, " total"]:
    """Return first[0], ..., first[0] + count[0] - 1, first[1], ... concatenated."""
    starts = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(first - starts, count)
