"""One shard file: its chunks one after another, their checksums, and Zarr's shard index.

Zarr readers see the chunks and the index at the end. The table of checksums before the index is
ours: the manifest holds the checksum of table and index together (the footer), so a chunk is
tied to the manifest, and a shard that was swapped with another of equal shape is found out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import StoreError
from ..format.checksum import crc32c
from .durable import announce, close, make_folder, sync

MISSING = np.uint64(2**64 - 1)
CHECKSUM_BYTES = 4


def footer_bytes(n_chunks: int) -> int:
    """Return the size of the footer of a shard that can hold `n_chunks` chunks."""
    return n_chunks * (4 + 16) + CHECKSUM_BYTES


def encode_footer(sizes: list[int], checksums: list[int], n_chunks: int) -> bytes:
    """Return the footer of chunks that lie one after another, their checksums included in `sizes`."""
    table = np.zeros(n_chunks, dtype="<u4")
    table[: len(checksums)] = checksums
    index = np.full((n_chunks, 2), MISSING, dtype="<u8")
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
    if not 0 < n_written <= n_chunks or (index[n_written:] != MISSING).any() or table[n_written:].any():
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


class ShardFile:
    """A shard that is being written under a temporary name, chunk after chunk."""

    def __init__(self, path: Path, n_chunks: int) -> None:
        self.path = path
        self.n_chunks = n_chunks
        self.sizes: list[int] = []
        self.checksums: list[int] = []
        announce(f"create {path.name}")
        self._file = path.open("wb")

    def append(self, stored: Any) -> None:
        """Write the next chunk and its checksum."""
        checksum = crc32c(stored)
        announce(f"write {self.path.name}")
        self._file.write(stored)
        self._file.write(checksum.to_bytes(CHECKSUM_BYTES, "little"))
        self.sizes.append(len(stored) + CHECKSUM_BYTES)
        self.checksums.append(checksum)

    def finish(self) -> tuple[int, int]:
        """Write the footer, flush to disk, and return the file's (bytes, footer checksum)."""
        footer = encode_footer(self.sizes, self.checksums, self.n_chunks)
        self._file.write(footer)
        sync(self._file)
        self._file.close()
        return sum(self.sizes) + len(footer), crc32c(footer)

    def abandon(self) -> None:
        """Close the file as it is; whoever clears the temporary folder removes it."""
        close(self._file)


Encoded = list[tuple[str, Any]]
"""The stored bytes of one chunk of each of some arrays, by array."""


class ShardInProgress:
    """The temporary files of a shard that is being written."""

    def __init__(self, number: int, folder: Path, n_chunks: dict[str, int]) -> None:
        self.number = number
        self._paths = {name: folder / f"{name.replace('/', '~')}.{number}" for name in n_chunks}
        self._n_chunks = n_chunks
        self._files: dict[str, ShardFile] = {}

    def append(self, encoded: Encoded) -> int:
        """Write the next chunk of each array; return the bytes written."""
        written = 0
        for name, stored in encoded:
            if name not in self._files:
                make_folder(self._paths[name].parent)
                self._files[name] = ShardFile(self._paths[name], self._n_chunks[name])
            self._files[name].append(stored)
            written += len(stored)
        return written

    def finish(self) -> dict[str, tuple[Path, int, int]]:
        """Flush the files; return each array's (temporary path, bytes, footer checksum)."""
        return {name: (file.path, *file.finish()) for name, file in self._files.items()}

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            file.abandon()
