"""Shard files mapped into memory, and their chunks decoded where they are wanted."""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from ..errors import StoreError
from .checksum import crc32c
from .codecs import decode_chunk
from .format import ArrayLayout
from .manifest import ShardRecord
from .shards import CHECKSUM_BYTES, footer_bytes, parse_footer

MAX_MAPPED_SHARDS = 256


class MappedShard:
    """One shard file, tied to the manifest by the checksum of its footer."""

    def __init__(self, store: Path, array: ArrayLayout, record: ShardRecord, n_chunks: int) -> None:
        key = array.shard_key(record.shard)
        file_record = record.files.get(key)
        self.where = f"the store '{store}' is damaged: '{key}'"
        if file_record is None:
            raise StoreError(f"{self.where} is not in its manifest")
        footer_size = footer_bytes(array.chunks_per_shard)
        try:
            handle = os.open(store / key, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{self.where} cannot be opened ({error.strerror})") from None
        try:
            size = os.fstat(handle).st_size
            if size != file_record.bytes or size < footer_size:
                raise StoreError(f"{self.where} has {size} bytes; expected {file_record.bytes}")
            self.data = np.frombuffer(mmap.mmap(handle, size, access=mmap.ACCESS_READ), dtype=np.uint8)
        finally:
            os.close(handle)
        footer = self.data[-footer_size:].tobytes()
        if crc32c(footer) != file_record.crc32c:
            raise StoreError(f"{self.where} has a footer that is not the one its manifest names")
        try:
            self.bounds, self.checksums = parse_footer(footer, array.chunks_per_shard, n_chunks, size)
        except StoreError as error:
            raise StoreError(f"{self.where}: {error}") from None

    def stored(self, chunk: int) -> np.ndarray:
        """Return a chunk's stored bytes without the checksum that follows them."""
        return self.data[self.bounds[chunk] : self.bounds[chunk + 1] - CHECKSUM_BYTES]

    def check(self, chunk: int) -> None:
        """Raise `StoreError` if a chunk does not have its checksum."""
        if crc32c(self.stored(chunk)) != self.checksums[chunk]:
            raise StoreError(f"{self.where}, chunk {chunk}: the data does not have its checksum")


class ShardCache:
    """The shards of one array that are mapped now: the latest used, so that open files stay few."""

    def __init__(self, store: Path, array: ArrayLayout, records: list[ShardRecord], context_size: int) -> None:
        self.array = array
        self._store = store
        self._records = records
        self._context_size = context_size
        self._mapped: OrderedDict[int, MappedShard] = OrderedDict()
        self._lock = threading.Lock()
        self._checked: dict[int, np.ndarray] = {}

    def shard(self, number: int) -> MappedShard:
        """Return a mapped shard."""
        with self._lock:
            mapped = self._mapped.get(number)
            if mapped is not None:
                self._mapped.move_to_end(number)
                return mapped
        record = self._records[number]
        mapped = MappedShard(self._store, self.array, record, self.array.n_chunks(record.contexts * self._context_size))
        with self._lock:
            self._checked.setdefault(number, np.zeros(self.array.chunks_per_shard, dtype=bool))
            self._mapped[number] = mapped
            while len(self._mapped) > MAX_MAPPED_SHARDS:
                self._mapped.popitem(last=False)
        return mapped

    def decode(self, chunk: int, out: np.ndarray, verify: str) -> None:
        """Decode a chunk, by its number in the array, into contiguous uint8 `out`."""
        number, within = divmod(chunk, self.array.chunks_per_shard)
        shard = self.shard(number)
        if verify == "always" or (verify == "first" and not self._checked[number][within]):
            shard.check(within)
            self._checked[number][within] = True
        try:
            decode_chunk(self.array, shard.stored(within), out)
        except StoreError as error:
            raise StoreError(f"{shard.where}, chunk {within}: {error}") from None
