"""Read a store's provenance: the document and position of each row, and the documents' hashes and names."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int64

from ...core.errors import StoreError
from ..format.layout import provenance_key
from ..format.manifest import Manifest
from ..local.store_files import StoreFiles

SHARDS_KEPT = 8


class DocumentReader:
    """The provenance tables of a store; the `SHARDS_KEPT` used last stay in memory."""

    def __init__(self, files: StoreFiles, manifest: Manifest) -> None:
        self._files = files
        self._manifest = manifest
        self._segments = lru_cache(maxsize=SHARDS_KEPT)(self._read_segments)

    def rows(self, start: int, stop: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return (document, position in it) of each row in [start, stop); -1 where unknown."""
        from ..format.provenance import expand_segments  # imports PyArrow, which training does not need

        shard_rows = self._manifest.header.shard_rows
        documents, positions = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for shard in range(start // shard_rows, -(-stop // shard_rows)):
            first = shard * shard_rows
            document, position = expand_segments(self._segments(shard))
            rows = slice(max(start - first, 0), stop - first)
            documents.append(document[rows])
            positions.append(position[rows])
        return np.concatenate(documents), np.concatenate(positions)

    def info(self, document: int) -> tuple[int | None, str | None]:
        """Return a document's (hash, name), each None where unknown."""
        for shard in range(len(self._manifest.shards)):
            table = self._segments(shard)
            found = np.flatnonzero(table["document"].fill_null(-1).to_numpy() == document)
            if len(found):
                row = table.slice(int(found[0]), 1).to_pylist()[0]
                return row["document_hash"], row["document_name"]
        raise StoreError(f"the store '{self._files.location}' has no document {document}")

    def _read_segments(self, shard: int) -> Any:
        from ..format.provenance import decode_segments

        key = provenance_key(shard)
        record = self._manifest.shards[shard]
        try:
            table = decode_segments(self._files.read_checked(key, record.files))
            if table["length"].to_numpy().sum() != record.contexts * self._manifest.header.context_size:
                raise StoreError("its runs do not cover the shard")
        except StoreError as error:
            raise StoreError(f"the store '{self._files.location}' is damaged: '{key}': {error}") from None
        return table
