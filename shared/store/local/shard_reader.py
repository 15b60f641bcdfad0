"""Read shards: `Shard` checks one file against the manifest, `ShardCache` keeps the shards of an array open."""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ...core.errors import StoreError
from ...core.location import StoreUrl
from ..format.checksum import crc32c
from ..format.codecs import decode_chunk
from ..format.footer import CHECKSUM_BYTES, footer_bytes, parse_footer
from ..format.layout import ArrayLayout
from ..format.manifest import FileRecord, ShardRecord

MAX_MAPPED_SHARDS = 256
VERIFY_BYTES = 8 << 20


class Shard:
    """One shard file, tied to the manifest by the checksum of its footer; subclasses know how to read its bytes.

    `where` begins each error message, `bounds` holds the offsets of the chunks and of the footer, `checksums` the
    chunks' checksums as the footer has them.
    """

    def __init__(self, store: Path | StoreUrl, array: ArrayLayout, record: ShardRecord) -> None:
        self.array = array
        self.record = record
        self.key = array.shard_key(record.shard)
        self.where = f"the store '{store}' is damaged: '{self.key}'"
        file = record.files.get(self.key)
        if file is None:
            raise StoreError(f"{self.where} is not in its manifest")
        self.file: FileRecord = file
        self.footer_size = footer_bytes(array.chunks_per_shard)
        self.bounds = self.checksums = np.zeros(0, dtype=np.int64)

    def span(self, start: int, stop: int) -> np.ndarray:
        """Return bytes [start, stop) of the file."""
        raise NotImplementedError

    def stored(self, chunk: int) -> np.ndarray:
        """Return a chunk's stored bytes without the checksum that follows them."""
        return self.span(int(self.bounds[chunk]), int(self.bounds[chunk + 1]) - CHECKSUM_BYTES)

    def check(self, chunk: int, stored: np.ndarray) -> None:
        """Raise `StoreError` if a chunk's stored bytes do not have its checksum."""
        if crc32c(stored) != self.checksums[chunk]:
            raise StoreError(f"{self.where}, chunk {chunk}: the data does not have its checksum")

    def faults(self, context_size: int, progress: Callable[[int], object] = lambda _: None) -> Iterator[str]:
        """Check every chunk; yield one line per damaged chunk, with the rows it holds.

        `progress` is called with the bytes checked since its last call. At most `VERIFY_BYTES`, or one chunk, are read
        at a time.
        """
        n_chunks = len(self.bounds) - 1
        first_row = self.record.shard * self.array.shard_rows
        last_row = first_row + self.record.contexts * context_size - 1
        first = 0
        while first < n_chunks:
            start = int(self.bounds[first])
            stop_at = max(first + 1, int(np.searchsorted(self.bounds, start + VERIFY_BYTES, side="right")) - 1)
            span = self.span(start, int(self.bounds[stop_at]))
            for chunk in range(first, stop_at):
                begin, end = int(self.bounds[chunk]) - start, int(self.bounds[chunk + 1]) - start
                try:
                    self.check(chunk, span[begin : end - CHECKSUM_BYTES])
                    if int.from_bytes(span[end - CHECKSUM_BYTES : end].tobytes(), "little") != self.checksums[chunk]:
                        raise StoreError(f"{self.where}, chunk {chunk}: the checksum behind it is not the footer's")
                except StoreError as error:
                    rows = first_row + chunk * self.array.chunk_rows
                    yield f"{error} (rows {rows} to {min(rows + self.array.chunk_rows - 1, last_row)})"
                progress(end - begin)
            first = stop_at

    def _read_footer(self, n_chunks: int) -> None:
        size = self.file.bytes
        footer = self.span(size - self.footer_size, size).tobytes()
        if crc32c(footer) != self.file.crc32c:
            raise StoreError(f"{self.where} has a footer that is not the one its manifest names")
        try:
            self.bounds, self.checksums = parse_footer(footer, self.array.chunks_per_shard, n_chunks, size)
        except StoreError as error:
            raise StoreError(f"{self.where}: {error}") from None


class MappedShard(Shard):
    """A shard in a file that is mapped into memory: the store's own, or a copy of it at `path`."""

    def __init__(
        self,
        store: Path | StoreUrl,
        array: ArrayLayout,
        record: ShardRecord,
        n_chunks: int,
        path: Path | None = None,
    ) -> None:
        super().__init__(store, array, record)
        if path is None:
            assert isinstance(store, Path)
            path = store / self.key
        self.path = path
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{self.where} cannot be opened ({error.strerror})") from None
        try:
            size = os.fstat(handle).st_size
            if size != self.file.bytes or size < self.footer_size:
                raise StoreError(f"{self.where} has {size} bytes; expected {self.file.bytes}")
            self.data = np.frombuffer(mmap.mmap(handle, size, access=mmap.ACCESS_READ), dtype=np.uint8)
        finally:
            os.close(handle)
        self._read_footer(n_chunks)

    def span(self, start: int, stop: int) -> np.ndarray:
        """Return bytes [start, stop) of the file as a view of the mapping."""
        return self.data[start:stop]


class ShardCache:
    """The open shards of one array: those used last, so that the number of mappings stays bounded.

    `open_shard` and `keep` may be overridden: how a shard is opened, and which shards stay open.
    """

    def __init__(
        self, store: Path | StoreUrl, array: ArrayLayout, records: list[ShardRecord], context_size: int
    ) -> None:
        self.array = array
        self.records = records
        self._store = store
        self._context_size = context_size
        self._mapped: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._checked: dict[int, np.ndarray] = {}

    def n_chunks(self, number: int) -> int:
        """Return how many chunks a shard holds."""
        return self.array.n_chunks(self.records[number].contexts * self._context_size)

    def prepare(self, chunks: np.ndarray) -> None:
        """Open the shards of chunks that will be decoded next, which checks each file's size and footer."""
        for number in np.unique(chunks // self.array.chunks_per_shard).tolist():
            self.shard(number)

    def shard(self, number: int) -> Shard:
        """Return a shard; open it if it is not open."""
        with self._lock:
            mapped = self._mapped.get(number)
            if mapped is not None:
                self._mapped.move_to_end(number)
                return mapped
        return self.keep(number, self.open_shard(number))

    def open_shard(self, number: int) -> Shard:
        """Open a shard."""
        assert isinstance(self._store, Path)
        return MappedShard(self._store, self.array, self.records[number], self.n_chunks(number))

    def keep(self, number: int, shard: Shard) -> Shard:
        """Keep an open shard, and close those used longest ago if there are too many; return the shard."""
        with self._lock:
            self._checked.setdefault(number, np.zeros(self.array.chunks_per_shard, dtype=bool))
            self._mapped[number] = shard
            while len(self._mapped) > MAX_MAPPED_SHARDS:
                self._mapped.popitem(last=False)
        return shard

    def view(self, chunk: int, scratch: np.ndarray, verify: str) -> np.ndarray:
        """Return a chunk's bytes: a view of the mapping if the codec is `none`, else `scratch`, decoded into."""
        if self.array.codec == "none":
            shard, within, stored = self._checked_bytes(chunk, verify)
            if stored.size != scratch.size:
                raise StoreError(f"{shard.where}, chunk {within}: expected {scratch.size} bytes, got {stored.size}")
            return stored
        self.decode(chunk, scratch, verify)
        return scratch

    def _checked_bytes(self, chunk: int, verify: str) -> tuple[Shard, int, np.ndarray]:
        """Return (shard, the chunk's number in it, its stored bytes), checked as `verify` says."""
        number, within = divmod(chunk, self.array.chunks_per_shard)
        shard = self.shard(number)
        stored = shard.stored(within)
        if verify == "always" or (verify == "first" and not self._checked[number][within]):
            shard.check(within, stored)
            self._checked[number][within] = True
        return shard, within, stored

    def decode(self, chunk: int, out: np.ndarray, verify: str) -> None:
        """Decode a chunk, by its number in the array, into contiguous uint8 `out`."""
        self._decode(*self._checked_bytes(chunk, verify), out)

    def _decode(self, shard: Shard, within: int, stored: np.ndarray, out: np.ndarray) -> None:
        """Decode a chunk's stored bytes; an error names the chunk."""
        try:
            decode_chunk(self.array, stored, out)
        except StoreError as error:
            raise StoreError(f"{shard.where}, chunk {within}: {error}") from None
