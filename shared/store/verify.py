"""Check every byte of a store, and name what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StoreError, UnreachableError
from .files import load_statistics
from .format import (
    PARTIAL_FOLDER,
    STAGED_FOLDER,
    STATISTICS,
    ArrayLayout,
    arrays_of,
    provenance_key,
    shard_keys,
    statistics_key,
)
from .manifest import ShardRecord
from .provenance import decode_segments
from .tokenizer_folder import read_tokenizer_files
from .verify_shard import shard_faults
from .zarr_metadata import metadata_files

if TYPE_CHECKING:
    from .reader import ActivationStore


def find_faults(store: ActivationStore, progress: Callable[[int], object]) -> list[str]:
    """Return one line per fault: the file, and for data the chunk and rows."""
    manifest = store.manifest
    work = [(array, record) for record in manifest.shards for array in arrays_of(manifest.header)]
    with ThreadPoolExecutor(store._threads, "store-verify") as pool:
        parts = list(pool.map(lambda item: _shard_faults(store, item[0], item[1], progress), work))
    faults = [fault for part in parts for fault in part]
    for record in manifest.shards:
        faults += _side_file_faults(store, record)
    return faults + _tokenizer_faults(store) + _whole_store_faults(store)


def _shard_faults(
    store: ActivationStore, array: ArrayLayout, record: ShardRecord, progress: Callable[[int], object]
) -> list[str]:
    n_chunks = array.n_chunks(record.contexts * store.context_size)
    try:
        shard = store.files.shard(array, record, n_chunks)
    except StoreError as error:
        return [_fault(error)]
    return list(shard_faults(shard, array, record, n_chunks, store.context_size, progress))


def _side_file_faults(store: ActivationStore, record: ShardRecord) -> list[str]:
    header = store.manifest.header
    expected = shard_keys(header, record.shard)
    faults = []
    if set(record.files) != set(expected):
        faults.append(f"the store '{store.path}' is damaged: its manifest names other files for shard {record.shard}")
    try:
        load_statistics(store.files, statistics_key(record.shard), record.files, header, record.contexts)
    except StoreError as error:
        faults.append(_fault(error))
    try:
        decode_segments(store.files.read_checked(provenance_key(record.shard), record.files))
    except StoreError as error:
        faults.append(_named(store, provenance_key(record.shard), error))
    return faults


def _tokenizer_faults(store: ActivationStore) -> list[str]:
    try:
        read_tokenizer_files(store)
    except StoreError as error:
        return [_fault(error)]
    return []


def _whole_store_faults(store: ActivationStore) -> list[str]:
    manifest = store.manifest
    expected = metadata_files(manifest.header, store.n_rows if store.complete else 0)
    if manifest.completion is None:
        faults = [
            f"the store '{store.path}' is not finished, yet '{key}' is not as in an unfinished store"
            for key, content in expected.items()
            if store.files.content(key) != content
        ]
        return faults
    faults = []
    for key in [STATISTICS, *expected]:
        try:
            if key == STATISTICS:
                load_statistics(store.files, key, manifest.completion.files, manifest.header, store.n_contexts)
            else:
                store.files.read_checked(key, manifest.completion.files)
        except StoreError as error:
            faults.append(_fault(error))
    faults += [
        f"the store '{store.path}' is complete, yet a temporary folder '{folder}' is left"
        for folder in (PARTIAL_FOLDER, STAGED_FOLDER)
        if isinstance(store.path, Path) and (store.path / folder).exists()
    ]
    return faults


def _named(store: ActivationStore, key: str, error: StoreError) -> str:
    """Return an error's line, with the file named once."""
    return _fault(error) if key in str(error) else f"the store '{store.path}' is damaged: '{key}': {error}"


def _fault(error: StoreError) -> str:
    """Return an error's line; raise it if it tells of the way to the store, not of the store."""
    if isinstance(error, UnreachableError):
        raise error
    return str(error)
