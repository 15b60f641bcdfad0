"""Provenance: the document and position of each row, as one Parquet file per shard with one line per run of rows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from ...core.errors import StoreError

_SCHEMA = pa.schema(
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
    """Runs of rows of one document with consecutive positions; -1 means unknown."""

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
    """Return the runs of some contexts, the first of which has number `first_context`; -1 means unknown."""
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
    """Return a shard's Parquet file. `info` maps documents to (hash, name), where known."""
    described = [info.get(int(document), (None, None)) for document in segments.document]
    hashes = [part[0] for part in described]
    columns = [
        _numbers(segments.context),
        _packed(segments.held_out),
        _numbers(segments.offset),
        _numbers(segments.length),
        _numbers(segments.document, known=segments.document >= 0),
        _numbers([each or 0 for each in hashes], np.uint64, _is_known(hashes)),
        _strings([part[1] for part in described]),
        _numbers(segments.position, known=segments.position >= 0),
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


# Arrays are made of buffers, for `pa.array` imports pandas where it is installed.


def _numbers(values: Any, dtype: Any = np.int64, known: np.ndarray | None = None) -> pa.Array:
    """Return integers as an Arrow array, with null where `known` is false."""
    values = np.ascontiguousarray(values, dtype=dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [_bits(known), pa.py_buffer(values)])


def _packed(values: np.ndarray) -> pa.Array:
    """Return booleans as an Arrow array."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])


def _strings(texts: list[str | None]) -> pa.Array:
    """Return texts as an Arrow array."""
    encoded = [(text or "").encode() for text in texts]
    offsets = np.zeros(len(texts) + 1, dtype=np.int32)
    np.cumsum([len(each) for each in encoded], out=offsets[1:])
    buffers = [_bits(_is_known(texts)), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def _is_known(values: list[Any]) -> np.ndarray:
    return np.array([value is not None for value in values], dtype=bool)


def _bits(values: np.ndarray | None) -> pa.Buffer | None:
    """Return booleans as an Arrow bitmap."""
    return None if values is None else pa.py_buffer(np.packbits(values, bitorder="little"))


def decode_segments(content: bytes) -> pa.Table:
    """Return a shard's runs."""
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"not a provenance table: {error}") from None
    if table.schema.names != _SCHEMA.names:
        raise StoreError(f"expected provenance columns {', '.join(_SCHEMA.names)}; got {', '.join(table.schema.names)}")
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
