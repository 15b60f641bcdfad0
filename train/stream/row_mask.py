"""Which rows of a store's chunks are training rows, cached as one bit per row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int64

if TYPE_CHECKING:
    from ...shared.store import ActivationStore

_BLOCK_ROWS = 64 << 10
"""Rows looked up at a time: about one chunk of the store's tokens, which must be decoded even for a few rows."""


class TrainingRowMask:
    """Look up which rows are training rows. The cache takes at most 125 MB for a billion rows."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._per_block = max(1, _BLOCK_ROWS // store.chunk_rows)
        self._blocks: dict[int, np.ndarray] = {}

    def of(self, chunks: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, "n chunk_rows"]:
        """Return for every row of some chunks whether it is a training row; rows beyond the store's end are not."""
        found = np.empty((len(chunks), self._store.chunk_rows), dtype=bool)
        blocks, within = np.divmod(chunks, self._per_block)
        for block in np.unique(blocks).tolist():
            here = np.flatnonzero(blocks == block)
            packed = self._block(block)[within[here]]
            found[here] = np.unpackbits(packed, axis=1, count=self._store.chunk_rows).view(bool)
        return found

    def _block(self, block: int) -> np.ndarray:
        """Return a block's chunks as packed bits, one line per chunk."""
        if block not in self._blocks:
            usable = np.zeros((self._per_block, self._store.chunk_rows), dtype=bool)
            start = block * usable.size
            mask = self._store.training_mask(start, min(start + usable.size, self._store.n_rows))
            usable.reshape(-1)[: len(mask)] = mask
            self._blocks[block] = np.packbits(usable, axis=1)
        return self._blocks[block]
