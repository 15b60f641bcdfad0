"""A shard file's footer: the checksums of its chunks, then Zarr's shard index.

Zarr readers use the chunks and the index at the end. The checksum table before the index is Thresher's: the manifest
holds the checksum of table and index together, which ties each chunk to the manifest. A shard that was swapped with
another one of the same shape is therefore detected.
"""

from __future__ import annotations

import numpy as np

from ...core.errors import StoreError
from .checksum import crc32c

MISSING_CHUNK = np.uint64(2**64 - 1)
CHECKSUM_BYTES = 4


def footer_bytes(n_chunks: int) -> int:
    """Return the size of the footer of a shard that can hold `n_chunks` chunks."""
    return n_chunks * (4 + 16) + CHECKSUM_BYTES


def encode_footer(sizes: list[int], checksums: list[int], n_chunks: int) -> bytes:
    """Return the footer of chunks that lie one after another, their checksums included in `sizes`."""
    table = np.zeros(n_chunks, dtype="<u4")
    table[: len(checksums)] = checksums
    index = np.full((n_chunks, 2), MISSING_CHUNK, dtype="<u8")
    index[: len(sizes), 0] = np.cumsum([0, *sizes[:-1]])
    index[: len(sizes), 1] = sizes
    packed = index.tobytes()
    return table.tobytes() + packed + crc32c(packed).to_bytes(4, "little")


def parse_footer(footer: bytes, n_chunks: int, n_written: int, file_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (chunk bounds [n_written + 1], checksums [n_written]) of a footer.

    Every chunk must lie directly behind the one before and the last directly before the footer:
    no offset or size of the file is taken on trust.
    """
    if len(footer) != footer_bytes(n_chunks):
        raise StoreError(f"expected a shard footer of {footer_bytes(n_chunks)} bytes, got {len(footer)}")
    table = np.frombuffer(footer, dtype="<u4", count=n_chunks)
    packed = footer[4 * n_chunks : -CHECKSUM_BYTES]
    if crc32c(packed) != int.from_bytes(footer[-CHECKSUM_BYTES:], "little"):
        raise StoreError("the shard index does not have its checksum")
    index = np.frombuffer(packed, dtype="<u8").reshape(n_chunks, 2)
    if not 0 < n_written <= n_chunks or (index[n_written:] != MISSING_CHUNK).any() or table[n_written:].any():
        raise StoreError(f"expected {n_written} chunks in the shard index, got another number")
    end = file_bytes - len(footer)
    sizes = index[:n_written, 1]
    if (sizes > max(end, 0)).any() or (sizes < CHECKSUM_BYTES).any():
        raise StoreError("the shard index names a chunk that is larger than the file or smaller than its checksum")
    bounds = np.zeros(n_written + 1, dtype=np.int64)
    np.cumsum(sizes.astype(np.int64), out=bounds[1:])
    if (index[:n_written, 0] != bounds[:-1].astype(np.uint64)).any() or bounds[-1] != end:
        raise StoreError("the chunks that the shard index names do not fill the file")
    return bounds, table[:n_written].astype(np.int64)
