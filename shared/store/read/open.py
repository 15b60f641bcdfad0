"""Open the files of a store for reading: in a folder, or in an object store through a cache."""

from __future__ import annotations

from pathlib import Path

from ...core.errors import MissingFileError
from ...core.location import StoreUrl, cache_folder, cache_limit
from ..format.layout import MANIFEST
from ..format.manifest import Manifest, read_manifest
from ..local.store_files import LocalFiles, StoreFiles


def open_files(location: Path | StoreUrl, cache: str | Path | None, cache_bytes: int | None) -> StoreFiles:
    """Return the files of a store in a folder or an object store; shards of the latter are copied to `cache`."""
    if isinstance(location, Path):
        return LocalFiles(location)
    from ..remote.cache import CacheFolder
    from ..remote.objects import RemoteStore
    from ..remote.remote_files import RemoteFiles

    return RemoteFiles(RemoteStore(location), CacheFolder(cache_folder(cache), cache_limit(cache_bytes)))


def find_manifest(store: Path | StoreUrl) -> Manifest | None:
    """Return a store's manifest; None if it has none."""
    if isinstance(store, Path):
        return read_manifest(store) if (store / MANIFEST).is_file() else None
    from ..remote.objects import RemoteStore
    from ..remote.remote_files import read_remote_manifest

    try:
        return read_remote_manifest(RemoteStore(store))
    except MissingFileError:
        return None
