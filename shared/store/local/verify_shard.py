"""Check every chunk of one shard, and name what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ...core.errors import StoreError
from ..format.layout import ArrayLayout
from ..format.manifest import ShardRecord
from .shard_file import CHECKSUM_BYTES
from .shard_reader import Shard

SPAN_BYTES = 8 << 20


def shard_faults(
    shard: Shard,
    array: ArrayLayout,
    record: ShardRecord,
    n_chunks: int,
    context_size: int,
    progress: Callable[[int], object] = lambda _: None,
) -> Iterator[str]:
    """Yield one line per chunk that is not as its footer says, with the rows it holds; read some MiB at a time."""
    first_row = record.shard * array.shard_rows
    last_row = first_row + record.contexts * context_size - 1
    first = 0
    while first < n_chunks:
        start = int(shard.bounds[first])
        stop_at = max(first + 1, int(np.searchsorted(shard.bounds, start + SPAN_BYTES, side="right")) - 1)
        span = shard.span(start, int(shard.bounds[stop_at]))
        for chunk in range(first, stop_at):
            begin, end = int(shard.bounds[chunk]) - start, int(shard.bounds[chunk + 1]) - start
            try:
                shard.check(chunk, span[begin : end - CHECKSUM_BYTES])
                if int.from_bytes(span[end - CHECKSUM_BYTES : end].tobytes(), "little") != shard.checksums[chunk]:
                    raise StoreError(f"{shard.where}, chunk {chunk}: the checksum behind it is not the footer's")
            except StoreError as error:
                rows = first_row + chunk * array.chunk_rows
                yield f"{error} (rows {rows} to {min(rows + array.chunk_rows - 1, last_row)})"
            progress(end - begin)
        first = stop_at
