"""Staged shards: shards that ranks have finished and flushed, but that cannot be committed before earlier ones.

A staged shard is a folder `.staged/<number>/`, put there by one rename, so it is whole or absent. It holds the shard's
files under temporary names and a record: the shard's line of the manifest as it would be directly behind the header,
so that the record belongs to one header only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...core.errors import StoreError
from ..format.checksum import crc32c
from ..format.footer import CHECKSUM_BYTES, footer_bytes, parse_footer
from ..format.layout import STAGED_FOLDER, ArrayLayout, Header, arrays_of, shard_keys
from ..format.manifest import FileRecord, Manifest, ShardRecord, encode_line, parse_line
from .durable import make_folder, move_into_place, remove_tree, sync_folder, temporary_name, write_synced

RECORD = "shard.json"


@dataclass(frozen=True)
class StagedShard:
    """A staged shard: its folder, its record, and the path of each of its files, by its path in the store."""

    folder: Path
    record: ShardRecord
    files: dict[str, Path]


def staged_folder(store: Path, shard: int) -> Path:
    """Return the folder of a staged shard."""
    return store / STAGED_FOLDER / f"{shard:05d}"


def stage_shard(store: Path, header: Header, written: Mapping[str, Path], record: ShardRecord, work: Path) -> None:
    """Stage a shard, whose flushed files are `written`: collect them in a folder below `work`, then rename that."""
    folder = work / f"{record.shard:05d}"
    make_folder(folder)
    move_into_place([(path, folder / temporary_name(key)) for key, path in written.items()])
    write_synced(folder / RECORD, encode_line(record, _checksum_of(header))[0])
    sync_folder(folder)
    target = staged_folder(store, record.shard)
    make_folder(target.parent)
    move_into_place([(folder, target)])


def read_staged(store: Path, header: Header, shard: int) -> StagedShard | None:
    """Return a staged shard, or None if there is none; raise `StoreError` if its record is not of this store."""
    folder = staged_folder(store, shard)
    try:
        line = (folder / RECORD).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    record, _ = parse_line(line.removesuffix(b"\n"), _checksum_of(header), 1)
    keys = shard_keys(header, shard)
    if not isinstance(record, ShardRecord) or record.shard != shard or set(record.files) != set(keys):
        raise StoreError(f"'{RECORD}' is not the record of shard {shard}")
    if record.contexts > header.contexts_per_shard:
        raise StoreError(f"'{RECORD}' names {record.contexts} contexts; a shard holds {header.contexts_per_shard}")
    return StagedShard(folder, record, {key: folder / temporary_name(key) for key in keys})


def list_staged(store: Path, header: Header) -> dict[int, StagedShard]:
    """Return every staged shard whose record is of this store, by number."""
    found = {}
    for number in _numbers(store):
        try:
            shard = read_staged(store, header, number)
        except StoreError:
            continue
        if shard is not None:
            found[number] = shard
    return found


def drop_unusable(store: Path, manifest: Manifest) -> list[str]:
    """Check every byte of the staged shards; remove those that are committed or damaged.

    Returns one line per damaged shard. After a kill, some files of the next shard may already have their final names:
    they count as staged.
    """
    faults = []
    header = manifest.header
    for number in _numbers(store):
        if number >= len(manifest.shards):
            try:
                shard = read_staged(store, header, number)
                if shard is None:
                    raise StoreError(f"it has no '{RECORD}'")
                _check_files(store, header, shard, may_be_in_place=number == len(manifest.shards))
                continue
            except StoreError as error:
                faults.append(f"staged shard {number} of '{store}' is dropped and will be made again: {error}")
        remove_tree(staged_folder(store, number))
    return faults


def _check_files(store: Path, header: Header, shard: StagedShard, may_be_in_place: bool) -> None:
    arrays = {array.shard_key(shard.record.shard): array for array in arrays_of(header)}
    n_rows = shard.record.contexts * header.context_size
    for key, path in shard.files.items():
        if may_be_in_place and not path.exists():
            path = store / key
        try:
            size = path.stat().st_size
            if size != shard.record.files[key].bytes:
                raise StoreError(f"'{path.name}' has {size} bytes, its record says {shard.record.files[key].bytes}")
            if key in arrays:
                _check_array(path, size, arrays[key], shard.record.files[key], n_rows)
            elif crc32c(path.read_bytes()) != shard.record.files[key].crc32c:
                raise StoreError(f"'{path.name}' does not have its checksum")
        except OSError as error:
            raise StoreError(f"cannot read '{path.name}' ({error.strerror})") from None


def _check_array(path: Path, size: int, array: ArrayLayout, record: FileRecord, n_rows: int) -> None:
    """Raise `StoreError` unless the footer has the record's checksum and every chunk the footer's."""
    footer_size = footer_bytes(array.chunks_per_shard)
    if size < footer_size:
        raise StoreError(f"'{path.name}' has {size} bytes, fewer than its footer")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    footer = data[size - footer_size :].tobytes()
    if crc32c(footer) != record.crc32c:
        raise StoreError(f"the footer of '{path.name}' does not have its checksum")
    bounds, checksums = parse_footer(footer, array.chunks_per_shard, array.n_chunks(n_rows), size)
    for chunk, checksum in enumerate(checksums):
        if crc32c(np.asarray(data[bounds[chunk] : bounds[chunk + 1] - CHECKSUM_BYTES])) != checksum:
            raise StoreError(f"chunk {chunk} of '{path.name}' does not have its checksum")


def _numbers(store: Path) -> list[int]:
    try:
        names = [path.name for path in (store / STAGED_FOLDER).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _checksum_of(header: Header) -> int:
    return encode_line(header, 0)[1]
