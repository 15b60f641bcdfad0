"""The files of a store as its readers see them (`StoreFiles`), and those of a store in a folder (`LocalFiles`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from ...core.errors import StoreError
from ...core.location import StoreUrl
from ..format.checksum import crc32c
from ..format.layout import ArrayLayout, Header, statistics_key
from ..format.manifest import FileRecord, Manifest, ShardRecord, read_manifest
from ..format.statistics import Statistics, decode_statistics
from .shard_reader import MappedShard, Shard, ShardCache


class StoreFiles(Protocol):
    """A store's files, in a folder or in an object store."""

    threads: int
    """How many threads reading should use even on fewer cores, because they wait for a network."""

    @property
    def location(self) -> Path | StoreUrl:
        """The store's folder or URL."""
        ...

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None while it has no header."""
        ...

    def read_checked(self, key: str, files: Mapping[str, FileRecord]) -> bytes:
        """Return the content of a file that the manifest names; raise `StoreError` if it differs."""
        ...

    def content(self, key: str) -> bytes | None:
        """Return a file's content, unchecked, or None if it does not exist."""
        ...

    def shard(self, array: ArrayLayout, record: ShardRecord, n_chunks: int) -> Shard:
        """Open a shard in the store itself, past any cache."""
        ...

    def shard_cache(self, array: ArrayLayout, manifest: Manifest) -> ShardCache:
        """Return the cache of an array's open shards."""
        ...


class LocalFiles:
    """A store in a folder."""

    threads = 1

    def __init__(self, location: Path) -> None:
        self.location = location

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None while it has no header."""
        return read_manifest(self.location)

    def read_checked(self, key: str, files: Mapping[str, FileRecord]) -> bytes:
        """Return the content of a file that the manifest names; raise `StoreError` if it differs."""
        return read_named(self.location, key, files, self._read)

    def _read(self, key: str, n_bytes: int) -> bytes:
        path = self.location / key
        try:
            size = path.stat().st_size
            content = path.read_bytes() if size == n_bytes else b""
        except OSError as error:
            raise StoreError(
                f"the store '{self.location}' is damaged: cannot read '{key}' ({error.strerror})"
            ) from None
        if len(content) != n_bytes:
            raise StoreError(
                f"the store '{self.location}' is damaged: '{key}' has {size} bytes, its manifest says {n_bytes}"
            )
        return content

    def content(self, key: str) -> bytes | None:
        """Return a file's content, unchecked, or None if it does not exist."""
        path = self.location / key
        return path.read_bytes() if path.is_file() else None

    def shard(self, array: ArrayLayout, record: ShardRecord, n_chunks: int) -> Shard:
        """Open a shard, mapped into memory."""
        return MappedShard(self.location, array, record, n_chunks)

    def shard_cache(self, array: ArrayLayout, manifest: Manifest) -> ShardCache:
        """Return the cache of an array's open shards."""
        return ShardCache(self.location, array, manifest.shards, manifest.header.context_size)


def read_named(
    location: Path | StoreUrl, key: str, files: Mapping[str, FileRecord], read: Callable[[str, int], bytes]
) -> bytes:
    """Return `read(key, bytes)` for a file that the manifest names; raise `StoreError` if its checksum differs."""
    record = files.get(key)
    if record is None:
        raise StoreError(f"the store '{location}' is damaged: its manifest does not name '{key}'")
    content = read(key, record.bytes)
    if crc32c(content) != record.crc32c:
        raise StoreError(f"the store '{location}' is damaged: '{key}' does not have its checksum")
    return content


def load_statistics(
    files: StoreFiles, key: str, records: Mapping[str, FileRecord], header: Header, n_contexts: int
) -> Statistics:
    """Return the statistics of `n_contexts` contexts from a file that the manifest names."""
    content = files.read_checked(key, records)
    try:
        return decode_statistics(content, header, n_contexts)
    except StoreError as error:
        raise StoreError(f"the store '{files.location}' is damaged: '{key}': {error}") from None


def shard_statistics(files: StoreFiles, manifest: Manifest) -> Iterator[Statistics]:
    """Yield each committed shard's statistics, checked against the manifest."""
    for record in manifest.shards:
        yield load_statistics(files, statistics_key(record.shard), record.files, manifest.header, record.contexts)
