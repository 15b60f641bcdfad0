"""Open the files of a store for reading: in a folder, or in an object store through a cache."""

from __future__ import annotations

from pathlib import Path

from ...core.location import StoreUrl, cache_folder, cache_limit
from ..local.store_files import LocalFiles, StoreFiles


def open_files(location: Path | StoreUrl, cache: str | Path | None, cache_bytes: int | None) -> StoreFiles:
    """Return the files of a store in a folder or an object store; shards of the latter are copied to `cache`."""
    if isinstance(location, Path):
        return LocalFiles(location)
    from ..remote.cache import CacheFolder
    from ..remote.objects import RemoteStore
    from ..remote.remote_files import RemoteFiles

    return RemoteFiles(RemoteStore(location), CacheFolder(cache_folder(cache), cache_limit(cache_bytes)))
