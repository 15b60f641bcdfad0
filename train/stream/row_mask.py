"""Which rows of a store's chunks are training rows, of all documents or of half of them, cached as one bit per row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Int64

if TYPE_CHECKING:
    from ...shared.store import ActivationStore

Half = Literal["even", "odd"]
"""Half of the documents, by their numbers in the store."""

_BLOCK_ROWS = 64 << 10
"""Rows looked up at a time: about one chunk of the store's tokens, which must be decoded even for a few rows."""


class TrainingRowMask:
    """Look up which rows are training rows. The cache takes at most 125 MB for a billion rows.

    With `documents`, only rows of half of the documents are; where a row's document is unknown, its context counts as
    one.
    """

    def __init__(self, store: ActivationStore, documents: Half | None = None) -> None:
        self._store = store
        self._documents = documents
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

    def rows_per_chunk(self) -> Int64[np.ndarray, " chunks"]:
        """Return the number of training rows in each chunk. For half of the documents, it is counted row by row."""
        if self._documents is None:
            return np.asarray(self._store.training_rows_per_chunk(), dtype=np.int64)
        n, size = self._store.n_chunks, self._per_block
        blocks = [np.arange(start, min(start + size, n)) for start in range(0, n, size)]
        return np.concatenate([self.of(chunks).sum(axis=1, dtype=np.int64) for chunks in blocks])

    def _block(self, block: int) -> np.ndarray:
        """Return a block's chunks as packed bits, one line per chunk."""
        if block not in self._blocks:
            usable = np.zeros((self._per_block, self._store.chunk_rows), dtype=bool)
            start = block * usable.size
            stop = min(start + usable.size, self._store.n_rows)
            mask = self._store.training_mask(start, stop)
            if self._documents is not None:
                mask = mask & (self._store.document_keys(start, stop) % 2 == (self._documents == "odd"))
            usable.reshape(-1)[: len(mask)] = mask
            self._blocks[block] = np.packbits(usable, axis=1)
        return self._blocks[block]
