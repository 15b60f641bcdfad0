"""Check every byte of a store, and list the faults."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...core.errors import StoreError, UnreachableError
from ..format.layout import (
    PARTIAL_FOLDER,
    STAGED_FOLDER,
    STATISTICS,
    ArrayLayout,
    arrays_of,
    provenance_key,
    shard_keys,
    statistics_key,
)
from ..format.manifest import Manifest, ShardRecord
from ..format.provenance import decode_segments
from ..format.zarr_metadata import metadata_files
from ..local.store_files import StoreFiles, load_statistics
from .tokenizer_folder import read_tokenizer_files


def find_faults(files: StoreFiles, manifest: Manifest, threads: int, progress: Callable[[int], object]) -> list[str]:
    """Return one line per fault: the file, and for activations, tokens and roles the chunk and its rows."""
    work = [(array, record) for record in manifest.shards for array in arrays_of(manifest.header)]
    with ThreadPoolExecutor(threads, "store-verify") as pool:
        parts = list(pool.map(lambda item: _shard_faults(files, manifest, item[0], item[1], progress), work))
    faults = [fault for part in parts for fault in part]
    for record in manifest.shards:
        faults += _side_file_faults(files, manifest, record)
    return faults + _tokenizer_faults(files, manifest) + _whole_store_faults(files, manifest)


def _shard_faults(
    files: StoreFiles,
    manifest: Manifest,
    array: ArrayLayout,
    record: ShardRecord,
    progress: Callable[[int], object],
) -> list[str]:
    n_chunks = array.n_chunks(record.contexts * manifest.header.context_size)
    try:
        shard = files.shard(array, record, n_chunks)
    except StoreError as error:
        return [_fault(error)]
    return list(shard.faults(manifest.header.context_size, progress))


def _side_file_faults(files: StoreFiles, manifest: Manifest, record: ShardRecord) -> list[str]:
    header = manifest.header
    expected = shard_keys(header, record.shard)
    faults = []
    if set(record.files) != set(expected):
        faults.append(
            f"the store '{files.location}' is damaged: its manifest names other files for shard {record.shard}"
        )
    try:
        load_statistics(files, statistics_key(record.shard), record.files, header, record.contexts)
    except StoreError as error:
        faults.append(_fault(error))
    try:
        decode_segments(files.read_checked(provenance_key(record.shard), record.files))
    except StoreError as error:
        faults.append(_named(files, provenance_key(record.shard), error))
    return faults


def _tokenizer_faults(files: StoreFiles, manifest: Manifest) -> list[str]:
    try:
        read_tokenizer_files(files, manifest.header.metadata)
    except StoreError as error:
        return [_fault(error)]
    return []


def _whole_store_faults(files: StoreFiles, manifest: Manifest) -> list[str]:
    expected = metadata_files(
        manifest.header, manifest.n_contexts * manifest.header.context_size if manifest.completion else 0
    )
    if manifest.completion is None:
        faults = [
            f"the store '{files.location}' is not finished, yet '{key}' is not as in an unfinished store"
            for key, content in expected.items()
            if files.content(key) != content
        ]
        return faults
    faults = []
    for key in [STATISTICS, *expected]:
        try:
            if key == STATISTICS:
                load_statistics(files, key, manifest.completion.files, manifest.header, manifest.n_contexts)
            else:
                files.read_checked(key, manifest.completion.files)
        except StoreError as error:
            faults.append(_fault(error))
    faults += [
        f"the store '{files.location}' is complete, yet a temporary folder '{folder}' is left"
        for folder in (PARTIAL_FOLDER, STAGED_FOLDER)
        if isinstance(files.location, Path) and (files.location / folder).exists()
    ]
    return faults


def _named(files: StoreFiles, key: str, error: StoreError) -> str:
    """Return an error's line, with the file named once."""
    return _fault(error) if key in str(error) else f"the store '{files.location}' is damaged: '{key}': {error}"


def _fault(error: StoreError) -> str:
    """Return an error's line; re-raise it if the store could not be reached."""
    if isinstance(error, UnreachableError):
        raise error
    return str(error)
