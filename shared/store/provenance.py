"""Where each row came from: one Parquet file a shard, one line per run of a document in a context."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from ..errors import StoreError

SCHEMA = pa.schema(
    [
        pa.field("context", pa.int64(), nullable=False),
        pa.field("held_out", pa.bool_(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("document", pa.int64()),
        pa.field("document_hash", pa.uint64()),
        pa.field("document_name", pa.string()),
        pa.field("position", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Segments:
    """Runs of rows with one document and consecutive positions; -1 stands for what is not known."""

    context: np.ndarray
    held_out: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    document: np.ndarray
    position: np.ndarray


def find_segments(
    documents: Int[np.ndarray, "n context"],
    positions: Int[np.ndarray, "n context"],
    held_out: np.ndarray,
    first_context: int,
) -> Segments:
    """Return the runs of contexts `first_context` and on; -1 marks an unknown document or position."""
    n, size = documents.shape
    starts = np.ones((n, size), dtype=bool)
    step = np.where(positions[:, :-1] < 0, 0, 1)
    starts[:, 1:] = (documents[:, 1:] != documents[:, :-1]) | (positions[:, 1:] != positions[:, :-1] + step)
    first = np.flatnonzero(starts)
    context, offset = np.divmod(first, size)
    return Segments(
        context=context + first_context,
        held_out=held_out[context],
        offset=offset,
        length=np.diff(first, append=n * size),
        document=documents.reshape(-1)[first],
        position=positions.reshape(-1)[first],
    )


def join_segments(parts: list[Segments]) -> Segments:
    """Return the runs of several batches as one."""
    return Segments(*(np.concatenate([getattr(part, name) for part in parts]) for name in Segments.__annotations__))


def encode_segments(segments: Segments, info: Mapping[int, tuple[int, str]]) -> bytes:
    """Return a shard's Parquet file. `info` gives a document's hash and name where they are known."""
    known = [info.get(int(document), (None, None)) for document in segments.document]
    columns = [
        pa.array(segments.context, pa.int64()),
        pa.array(segments.held_out, pa.bool_()),
        pa.array(segments.offset, pa.int64()),
        pa.array(segments.length, pa.int64()),
        pa.array(segments.document, pa.int64(), mask=segments.document < 0),
        pa.array([part[0] for part in known], pa.uint64()),
        pa.array([part[1] for part in known], pa.string()),
        pa.array(segments.position, pa.int64(), mask=segments.position < 0),
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def decode_segments(content: bytes) -> pa.Table:
    """Return a shard's runs."""
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"no provenance table: {error}") from None
    if table.schema.names != SCHEMA.names:
        raise StoreError(f"expected provenance columns {', '.join(SCHEMA.names)}; got {', '.join(table.schema.names)}")
    return table


def expand_segments(table: pa.Table) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Return (document, position) of each row of a shard; -1 where unknown."""
    length = _column(table, "length")
    document = _column(table, "document")
    position = _column(table, "position")
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    known = np.repeat(position >= 0, length)
    return np.repeat(document, length), np.where(known, np.repeat(position, length) + within, -1)


def _column(table: pa.Table, name: str) -> Any:
    return table[name].fill_null(-1).to_numpy()
