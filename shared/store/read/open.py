"""Which files a store is read from: a folder's, or an object store's with their copies."""

from __future__ import annotations

from pathlib import Path

from ...core.location import StoreUrl, cache_folder, cache_limit
from ..local.store_files import LocalFiles, StoreFiles


def open_files(location: Path | StoreUrl, cache: str | Path | None, cache_bytes: int | None) -> StoreFiles:
    """Return the files of a store in a folder or an object store, whose shards are copied to `cache`."""
    if isinstance(location, Path):
        return LocalFiles(location)
    from ..remote.cache import CacheFolder
    from ..remote.objects import RemoteStore
    from ..remote.remote_files import RemoteFiles

    return RemoteFiles(RemoteStore(location), CacheFolder(cache_folder(cache), cache_limit(cache_bytes)))
