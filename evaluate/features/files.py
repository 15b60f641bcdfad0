"""The feature index on disk: one Parquet file per SAE, one row per latent, readable without the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...shared.core.disk import replacing
from ...shared.core.errors import ConfigError, DataError, MissingFileError
from ...shared.core.paths import user_path
from .token_text import TokenTexts

ROW_GROUP = 512
_METADATA_KEY = b"thresher.features"

CONTEXT_TYPE = pa.struct(
    {
        "activation": pa.float32(),
        "context": pa.int64(),
        "offset": pa.int32(),
        "document": pa.int64(),
        "position": pa.int64(),
        "peak": pa.int32(),
        "tokens": pa.list_(pa.int32()),
        "activations": pa.list_(pa.float32()),
    }
)
TOKEN_EFFECT = pa.struct({"token": pa.int32(), "effect": pa.float32()})
NEIGHBOUR = pa.struct({"latent": pa.int64(), "score": pa.float32()})
_SCHEMA = pa.schema(
    {
        "latent": pa.int64(),
        "firings": pa.int64(),
        "density": pa.float64(),
        "mean_activation": pa.float64(),
        "max_activation": pa.float32(),
        "interestingness": pa.float32(),
        "histogram_end": pa.float32(),
        "histogram": pa.list_(pa.int32()),
        "top": pa.list_(CONTEXT_TYPE),
        "sampled": pa.list_(CONTEXT_TYPE),
        "promoted": pa.list_(TOKEN_EFFECT),
        "suppressed": pa.list_(TOKEN_EFFECT),
        "neighbours": pa.list_(NEIGHBOUR),
    }
)


class FeatureIndex:
    """One SAE's feature index, read from its Parquet file a row group at a time.

    `metadata` holds the SAE's name and the settings; `texts` the text of every token id that occurs, alone and in
    context; `documents` the names of the documents that have one.
    """

    def __init__(self, path: Path, file: pq.ParquetFile, described: Mapping[str, Any]):
        self.path = path
        self.n_latents: int = file.metadata.num_rows
        self.metadata: dict[str, Any] = dict(described["metadata"])
        self.texts = TokenTexts(
            {int(token): text for token, text in described["vocabulary"].items()},
            {int(token): bytes.fromhex(piece) for token, piece in described.get("partial", {}).items()},
        )
        self.documents = {int(document): name for document, name in described["documents"].items()}
        self._file = file

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open an index.

        Raises:
            MissingFileError: no file exists at `path`.
            DataError: the file is not a feature index.
        """
        path = user_path(path)
        if not path.is_file():
            raise MissingFileError(f"no feature index at '{path}'; build it with build_feature_index")
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
            described = json.loads((file.schema_arrow.metadata or {})[_METADATA_KEY])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(f"'{path}' is not a feature index: {error}") from None
        return cls(path, file, described)

    def is_intact(self) -> bool:
        """Read every page and return whether all checksums match."""
        try:
            for _ in self._file.iter_batches(batch_size=ROW_GROUP):
                pass
        except (pa.ArrowException, OSError, ValueError):
            return False
        return True

    def batches(self, size: int = ROW_GROUP) -> Iterator[list[dict[str, Any]]]:
        """Yield the latents in order, `size` at a time, as plain objects."""
        for batch in self._file.iter_batches(batch_size=size):
            yield batch.to_pylist()

    def latent(self, number: int) -> dict[str, Any]:
        """Return one latent's row as plain objects.

        Raises:
            ConfigError: the SAE has no such latent.
        """
        if not 0 <= number < self.n_latents:
            raise ConfigError(f"expected a latent from 0 to {self.n_latents - 1} of '{self.path}', got {number}")
        size = self._file.metadata.row_group(0).num_rows
        return self._file.read_row_group(number // size).slice(number % size, 1).to_pylist()[0]

    def columns(self, names: list[str]) -> pa.Table:
        """Return some columns of all latents."""
        return self._file.read(columns=names)

    @property
    def vocabulary(self) -> dict[int, str]:
        """The text of every token id that occurs, each decoded alone."""
        return self.texts.vocabulary

    @cached_property
    def name(self) -> str:
        """The SAE's name."""
        return str(self.metadata["name"])


def write_index(
    path: Path,
    n_latents: int,
    rows: Callable[[int, int], dict[str, pa.Array]],
    metadata: Mapping[str, Any],
    texts: TokenTexts,
    documents: Mapping[int, str],
) -> FeatureIndex:
    """Write an index atomically, one row group at a time; `rows(start, stop)` returns the columns of those latents."""
    partial = {token: piece.hex() for token, piece in texts.partial.items()}
    described = {"metadata": dict(metadata), "vocabulary": texts.vocabulary, "partial": partial, "documents": documents}
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(described, ensure_ascii=False).encode()})
    with (
        replacing(path) as unfinished,
        unfinished.open("wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for start in range(0, n_latents, ROW_GROUP):
            columns = rows(start, min(start + ROW_GROUP, n_latents))
            writer.write_table(
                pa.table([columns[name].cast(_SCHEMA.field(name).type) for name in _SCHEMA.names], schema)
            )
    return FeatureIndex.open(path)


def nested(counts: np.ndarray, values: pa.Array) -> pa.ListArray:
    """Return a list column: the first counts[0] of `values`, then the next counts[1], ..."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def struct(kind: pa.StructType, columns: Mapping[str, Any]) -> pa.StructArray:
    """Return a struct column from the columns of its fields."""
    parts = []
    for field in kind:
        values = columns[field.name]
        if isinstance(values, np.ndarray) and values.ndim == 2:
            flat = pa.array(values.reshape(-1)).cast(field.type.value_type)
            parts.append(nested(np.full(len(values), values.shape[1]), flat))
        else:
            parts.append(pa.array(values).cast(field.type))
    return pa.StructArray.from_arrays(parts, fields=list(kind))
