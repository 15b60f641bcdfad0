"""Choose the contexts that represent a latent: the strongest ones, and a uniform sample of all in which it fires."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64

from .sparse import ActiveLatents, runs


class BestContexts:
    """The `n` contexts of highest priority for each latent, with the activations around the peak."""

    def __init__(self, d_sae: int, n: int, window: int):
        self.n, self.window = n, window
        self.priority = np.full((d_sae, n), -np.inf)
        self.row = np.full((d_sae, n), -1, dtype=np.int64)
        self.value = np.zeros((d_sae, n), dtype=np.float32)
        self.activations = np.zeros((d_sae, n, window), dtype=np.float16)

    def add(
        self,
        block: ActiveLatents,
        latent: Int64[np.ndarray, " peaks"],
        row: Int64[np.ndarray, " peaks"],
        value: Float[np.ndarray, " peaks"],
        priority: Float[np.ndarray, " peaks"],
    ) -> None:
        """Add one peak per latent and context, sorted by latent, and keep those of highest priority."""
        first, count = runs(latent)
        better = priority > np.repeat(self.priority[latent[first]].min(axis=1), count)
        latent, row, value, priority = latent[better], row[better], value[better], priority[better]
        if not len(latent):
            return
        first, count = runs(latent)
        if count.max() > self.n:  # more than can be kept for one latent
            order = np.lexsort((-priority, latent))
            chosen = np.sort(order[np.arange(len(order)) - np.repeat(first, count) < self.n])
            latent, row, value, priority = latent[chosen], row[chosen], value[chosen], priority[chosen]
            first, count = runs(latent)
        affected = latent[first]
        place = np.arange(len(latent)) - np.repeat(first, count)
        line = np.repeat(np.arange(len(affected)), count)
        shape = (len(affected), self.n + int(count.max()))
        offered = np.full(shape, -np.inf)
        rows = np.full(shape, -1, dtype=np.int64)
        values = np.zeros(shape, dtype=np.float32)
        for table, kept, new in (
            (offered, self.priority, priority),
            (rows, self.row, row),
            (values, self.value, value),
        ):
            table[:, : self.n] = kept[affected]
            table[line, self.n + place] = new
        chosen = np.argsort(-offered, axis=1, kind="stable")[:, : self.n]
        self.priority[affected] = np.take_along_axis(offered, chosen, axis=1)
        self.row[affected] = np.take_along_axis(rows, chosen, axis=1)
        self.value[affected] = np.take_along_axis(values, chosen, axis=1)
        self._move_activations(block, affected, chosen)

    def _move_activations(self, block: ActiveLatents, affected: np.ndarray, chosen: np.ndarray) -> None:
        kept = np.take_along_axis(self.activations[affected], chosen.clip(max=self.n - 1)[:, :, None], axis=1)
        line, slot = np.nonzero((chosen >= self.n) & (self.row[affected] >= 0))
        rows = window_start(self.row[affected[line], slot], block.context_size, self.window)[:, None] + np.arange(
            self.window
        )
        kept[line, slot] = block.lookup(rows, np.broadcast_to(affected[line][:, None], rows.shape)).clip(max=65504)
        self.activations[affected] = kept


def window_start(row: Int64[np.ndarray, " n"], context_size: int, window: int) -> Int64[np.ndarray, " n"]:
    """Return the first row of the window around a peak: two thirds of it before the peak, all within the context."""
    context = row - row % context_size
    return context + (row - context - window * 2 // 3).clip(0, max(context_size - window, 0))


def sampling_priority(
    latent: Int64[np.ndarray, " n"], context: Int64[np.ndarray, " n"], seed: int
) -> Float[np.ndarray, " n"]:
    """Return a fixed random number in [0, 1) per latent and context; a latent's n highest are a uniform sample.

    The sample does not depend on the order and size of the blocks. The mixing function is SplitMix64's.
    """
    with np.errstate(over="ignore"):
        mixed = latent.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + context.astype(np.uint64)
        mixed += np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        for _ in range(2):
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
