"""Read a store in an object store: small files directly, shards through copies in the cache or chunk by chunk.

A shard is copied whole if the whole store fits into the cache, or if one call asks for a quarter of its chunks. Of
other shards only the requested chunks are downloaded, because shuffling reads a few chunks of every shard.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...core.errors import MissingFileError, StoreError
from ...core.location import StoreUrl, owner_of
from ..format.layout import MANIFEST, ArrayLayout, Header, arrays_of
from ..format.manifest import FileRecord, Manifest, ShardRecord, manifest_of
from ..local.shard_reader import MappedShard, Shard, ShardCache
from ..local.store_files import read_named
from .cache import CacheFolder
from .lease import LEASE
from .objects import RemoteStore

WHOLE_FRACTION = 4
MAX_FOOTERS = 4096


class RangedShard(Shard):
    """A shard of which only the footer was downloaded; its chunks are downloaded when they are read."""

    def __init__(self, remote: RemoteStore, array: ArrayLayout, record: ShardRecord, n_chunks: int) -> None:
        super().__init__(remote.url, array, record)
        self._remote = remote
        try:
            size = remote.size(self.key)
        except MissingFileError as error:
            raise StoreError(f"{self.where} cannot be read: {error}") from None
        if size != self.file.bytes or size < self.footer_size:
            raise StoreError(f"{self.where} has {size} bytes; expected {self.file.bytes}")
        self._read_footer(n_chunks)

    def span(self, start: int, stop: int) -> np.ndarray:
        """Return bytes [start, stop) of the object."""
        return np.frombuffer(self._remote.get_range(self.key, start, stop - start), dtype=np.uint8)


class RemoteShardCache(ShardCache):
    """The open shards of one remote array: mapped copies, and footers of those that are read chunk by chunk."""

    def __init__(self, remote: RemoteStore, cache: CacheFolder, array: ArrayLayout, manifest: Manifest) -> None:
        super().__init__(remote.url, array, manifest.shards, manifest.header.context_size)
        self._remote = remote
        self._cache = cache
        self._owner = owner_of(remote.url)
        self._fits = stored_bytes(manifest) <= cache.limit
        self._whole: set[int] = set()

    def prepare(self, chunks: np.ndarray) -> None:
        """Choose which shards of these chunks will be copied whole when the first of their chunks is read."""
        numbers, counts = np.unique(chunks // self.array.chunks_per_shard, return_counts=True)
        whole = set()
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if self._fits or WHOLE_FRACTION * count >= self.n_chunks(number):
                whole.add(number)
        with self._lock:
            self._whole |= whole
            for number in whole:
                mapped = self._mapped.get(number)
                if isinstance(mapped, MappedShard):
                    self._cache.touch(mapped.path)
                elif mapped is not None:
                    del self._mapped[number]

    def view(self, chunk: int, scratch: np.ndarray, verify: str) -> np.ndarray:
        """Return a chunk's bytes in `scratch`, never as a view: a copy of the shard may be replaced at any time."""
        self.decode(chunk, scratch, verify)
        return scratch

    def decode(self, chunk: int, out: np.ndarray, verify: str) -> None:
        """Decode a chunk; if the copy in the cache is damaged, remove it and read the chunk again.

        It is read from the shard opened here, not from `self.shard`: another thread that met the same damaged copy may
        put it back there.
        """
        number, within = divmod(chunk, self.array.chunks_per_shard)
        shard = self.shard(number)
        if isinstance(shard, RangedShard):
            super().decode(chunk, out, "always")
            return
        try:
            super().decode(chunk, out, verify)
        except StoreError:
            with self._lock:
                self._mapped.pop(number, None)
            assert isinstance(shard, MappedShard)
            shard.path.unlink(missing_ok=True)
            shard = self.keep(number, self.open_shard(number))
            stored = shard.stored(within)
            shard.check(within, stored)
            self._decode(shard, within, stored, out)

    def open_shard(self, number: int) -> Shard:
        """Open a shard: its copy, made if it is to be copied whole and there is room, or else by ranges."""
        record, n_chunks = self.records[number], self.n_chunks(number)
        if number in self._whole:
            path = self._copy(record, n_chunks)
            if path is not None:
                with suppress(StoreError):  # another process may have removed it since
                    return MappedShard(self._remote.url, self.array, record, n_chunks, path)
        return RangedShard(self._remote, self.array, record, n_chunks)

    def keep(self, number: int, shard: Shard) -> Shard:
        """Keep an open shard, and unmap copies that were removed from the cache: they would still use disk space."""
        with self._lock:
            self._checked.setdefault(number, np.zeros(self.array.chunks_per_shard, dtype=bool))
            self._mapped[number] = shard
            if isinstance(shard, MappedShard):
                gone = [n for n, s in self._mapped.items() if isinstance(s, MappedShard) and not s.path.exists()]
                for other in gone:
                    if other != number:
                        del self._mapped[other]
            self._whole.discard(number)
            while len(self._mapped) > MAX_FOOTERS:
                self._mapped.popitem(last=False)
        return shard

    def _copy(self, record: ShardRecord, n_chunks: int) -> Path | None:
        """Return a checked copy of a shard in the cache, or None if the cache has no room for it."""
        key = self.array.shard_key(record.shard)
        if key not in record.files:
            return None
        n_bytes = record.files[key].bytes
        url = self._remote.url

        def is_good(path: Path) -> bool:
            try:
                MappedShard(url, self.array, record, n_chunks, path)
            except StoreError:
                return False
            return True

        def write(path: Path) -> None:
            handle = os.open(path, os.O_RDWR)
            try:
                self._remote.download(key, n_bytes, handle)
            finally:
                os.close(handle)
            shard = MappedShard(url, self.array, record, n_chunks, path)
            for fault in shard.faults(self._context_size):
                raise StoreError(fault)

        if n_bytes > self._cache.limit:
            return None
        try:
            size = self._remote.size(key)
        except MissingFileError as error:
            raise StoreError(f"the store '{url}' is damaged: '{key}' cannot be read: {error}") from None
        if size != n_bytes:
            raise StoreError(f"the store '{url}' is damaged: '{key}' has {size} bytes; expected {n_bytes}")
        return self._cache.fetch(self._owner, key, n_bytes, is_good, write)


class RemoteFiles:
    """A store in an object store."""

    threads = 16

    def __init__(self, remote: RemoteStore, cache: CacheFolder) -> None:
        self.location: Path | StoreUrl = remote.url
        self._remote = remote
        self._cache = cache
        cache.trim()

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None while it has no header."""
        return read_remote_manifest(self._remote)

    def read_checked(self, key: str, files: Mapping[str, FileRecord]) -> bytes:
        """Return the content of a file that the manifest names; raise `StoreError` if it differs."""
        return read_object(self._remote, key, files)

    def content(self, key: str) -> bytes | None:
        """Return a file's content, unchecked, or None if it does not exist."""
        try:
            return self._remote.get(key)
        except MissingFileError:
            return None

    def shard(self, array: ArrayLayout, record: ShardRecord, n_chunks: int) -> Shard:
        """Open a shard in the object store, past the cache."""
        return RangedShard(self._remote, array, record, n_chunks)

    def shard_cache(self, array: ArrayLayout, manifest: Manifest) -> ShardCache:
        """Return the cache of an array's open shards."""
        return RemoteShardCache(self._remote, self._cache, array, manifest)


def read_remote_manifest(remote: RemoteStore) -> Manifest | None:
    """Return a remote store's manifest, or None while it has no header; raises the errors of `read_manifest`."""
    url = remote.url
    try:
        content = remote.get(MANIFEST)
    except MissingFileError:
        if remote.is_empty(ignoring=LEASE):  # a writer that has only begun
            raise MissingFileError(f"no activation store at '{url}'; harvest one, or give the URL of one") from None
        raise StoreError(f"'{url}' is not an activation store: it has no {MANIFEST}") from None
    return manifest_of(url, content)


def read_object(remote: RemoteStore, key: str, files: Mapping[str, FileRecord]) -> bytes:
    """Return the content of an object that the manifest names; raise `StoreError` if it differs."""
    try:
        return read_named(remote.url, key, files, remote.get)
    except MissingFileError as error:
        raise StoreError(f"the store '{remote.url}' is damaged: {error}") from None


def stored_bytes(manifest: Manifest) -> int:
    """Return the bytes of all shards of all arrays."""
    header: Header = manifest.header
    arrays = arrays_of(header)
    records = [(record, array.shard_key(record.shard)) for record in manifest.shards for array in arrays]
    return sum(record.files[key].bytes for record, key in records if key in record.files)
