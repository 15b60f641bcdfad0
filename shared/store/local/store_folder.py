"""A store's folder as the writer sees it: begun, locked, a shard committed at a time, completed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
from msgspec.structs import replace

from ...core.errors import ConfigError, StoreBusyError, StoreError
from ...core.location import StoreUrl
from ..format.checksum import crc32c
from ..format.layout import (
    MANIFEST,
    PARTIAL_FOLDER,
    STAGED_FOLDER,
    STATISTICS,
    Header,
    arrays_of,
    provenance_key,
    shard_keys,
    statistics_key,
)
from ..format.manifest import Completion, FileRecord, Manifest, ShardRecord, encode_line, read_manifest
from ..format.provenance import Segments, encode_segments, join_segments
from ..format.statistics import Statistics, encode_statistics, merge_statistics
from ..format.zarr_metadata import metadata_files
from .durable import (
    announce,
    close,
    disk_errors,
    lock,
    make_folder,
    move_into_place,
    remove_tree,
    stage,
    sync,
    sync_folder,
)
from .shard_file import ShardInProgress
from .staged_shards import StagedShard, drop_unusable, list_staged, read_staged
from .store_files import LocalFiles, shard_statistics

RECOVERED_SHARDS = 4
"""Shards behind the last one named of which a killed writer may have left files: the one that it committed, or those
that it made anew."""


@dataclass(frozen=True)
class WrittenShard:
    """A shard whose arrays are written, and what goes beside them: `info` has documents' hashes and names."""

    arrays: ShardInProgress
    n_contexts: int
    statistics: Statistics
    segments: list[Segments]
    info: Mapping[int, tuple[int, str]]


class StoreFolder:
    """The folder, locked for this process until `close`."""

    def __init__(
        self, path: Path, file: IO[bytes], manifest: Manifest | None, keep_contexts: int | None = None
    ) -> None:
        self.path = path
        self.partial = path / PARTIAL_FOLDER
        self.faults: list[str] = []
        self._file = file
        self._manifest = manifest
        self._keep_shards = None
        if manifest is not None and keep_contexts is not None:
            per_shard = manifest.header.contexts_per_shard
            whole = sum(shard.contexts == per_shard for shard in manifest.shards)
            self._keep_shards = min(keep_contexts // per_shard, whole)

    @classmethod
    def open(
        cls,
        path: Path,
        proposed: Header,
        resume: bool,
        any_level: bool,
        keep_staged: bool = False,
        keep_contexts: int | None = None,
    ) -> StoreFolder:
        """Lock the store at `path`, made if need be, and clear what a killed writer left half done.

        Shards that ranks staged directly behind the committed ones become part of the store; those behind a gap are
        kept if asked for, or else removed.

        A store that was declared with another number of contexts is refused unless `keep_contexts` is given: then
        `start` declares it anew, and keeps the shards that lie wholly within so many contexts.
        """
        if path.exists() and not path.is_dir():
            raise StoreError(f"expected a folder for the store, got a file at '{path}'; name another path")
        if path.is_dir() and not (path / MANIFEST).exists() and any(path.iterdir()):
            raise StoreError(f"'{path}' holds other files and no store; name an empty or new folder")
        with disk_errors(path):
            make_folder(path)
            file = (path / MANIFEST).open("a+b")
            try:
                lock(file, path)
                check_in_place(file, path)
                manifest = read_manifest(path)
                if manifest is not None:
                    if manifest.header.n_contexts == proposed.n_contexts:
                        keep_contexts = None
                    free = {"has_tokens"} | ({"codec_level"} if any_level else set())
                    free |= {"n_contexts", "metadata"} if keep_contexts is not None else set()
                    check_same(manifest, proposed, path, resume, free)
                    if keep_contexts is not None and list_staged(path, manifest.header):
                        raise StoreError(
                            f"finished shards of several ranks wait in the store '{path}', which was begun with "
                            f"{manifest.header.n_contexts} contexts: resume it with these before it is extended"
                        )
                folder = cls(path, file, manifest, keep_contexts)
                folder._recover(keep_staged)
            except BaseException:
                close(file)
                raise
        return folder

    @property
    def header(self) -> Header | None:
        """The store's header, or None before the first batch, with which it is begun or declared anew."""
        return self._manifest.header if self._manifest and self._keep_shards is None else None

    @property
    def n_contexts(self) -> int:
        """Contexts in committed shards, of those that are kept."""
        if self._manifest is not None and self._keep_shards is not None:
            return self._keep_shards * self._manifest.header.contexts_per_shard
        return self._manifest.n_contexts if self._manifest else 0

    @property
    def may_append(self) -> bool:
        """Whether more shards may follow: not after the last one."""
        manifest = self._manifest
        if self._keep_shards is not None:
            return True
        if manifest is None or not manifest.shards:
            return manifest is None or manifest.completion is None
        return manifest.completion is None and manifest.shards[-1].contexts == manifest.header.contexts_per_shard

    def _recover(self, keep_staged: bool) -> None:
        """Cut a torn last line off the manifest, adopt what was staged, and remove files that it does not name."""
        manifest = self._manifest
        whole = manifest.n_bytes if manifest else 0
        if (self.path / MANIFEST).stat().st_size > whole:
            announce("cut the manifest")
            self._file.truncate(whole)
            sync(self._file)
        self.clear_partial()
        if manifest is not None and manifest.completion is None:
            self._write_metadata(0)
            self.faults = drop_unusable(self.path, manifest)
            self.adopt()
            self._remove_unnamed(RECOVERED_SHARDS)
        if not keep_staged:
            self._clear_staged()

    def _remove_unnamed(self, n_shards: int) -> None:
        """Remove files of the shards behind the last that the manifest names."""
        assert self._manifest is not None
        first = len(self._manifest.shards)
        for shard in range(first, first + n_shards):
            for key in shard_keys(self._manifest.header, shard):
                (self.path / key).unlink(missing_ok=True)

    def start(self, header: Header) -> Header:
        """Begin the store, or declare it anew: its header line, then the metadata of its arrays."""
        if self._keep_shards is not None:
            return self._declare_anew(header, self._keep_shards)
        with disk_errors(self.path):
            try:
                line, checksum = encode_line(header, 0)
            except (TypeError, msgspec.MsgspecError, ValueError) as error:
                raise ConfigError(f"expected metadata that JSON can hold; {error}") from None
            self._append(line)
            sync_folder(self.path)
            self._manifest = Manifest(header, shards=[], n_bytes=len(line), checksum=checksum)
            self._write_metadata(0)
        return header

    def _declare_anew(self, header: Header, n_shards: int) -> Header:
        """Replace the manifest by one with another header that names the first shards, then remove what it does not.

        Before the one step that replaces it the store is what it was, afterwards one that can be resumed.
        """
        assert self._manifest is not None
        old = self._manifest
        header = replace(header, has_tokens=old.header.has_tokens, codec_level=old.header.codec_level)
        manifest = Manifest(header, shards=old.shards[:n_shards])
        content = b""
        for entry in (header, *manifest.shards):
            line, manifest.checksum = encode_line(entry, manifest.checksum)
            content += line
        manifest.n_bytes = len(content)
        with disk_errors(self.path):
            staged = stage(self.partial, MANIFEST, content)
            file = staged.open("a+b")
            try:
                lock(file, self.path)  # so that no other writer comes in between
                move_into_place([(staged, self.path / MANIFEST)])
            except BaseException:
                close(file)
                raise
            close(self._file)
            self._file, self._manifest, self._keep_shards = file, manifest, None
            self._follow(content)
            self._write_metadata(0)
            (self.path / STATISTICS).unlink(missing_ok=True)
            self._remove_unnamed(len(old.shards) - n_shards)
        return header

    def _follow(self, content: bytes) -> None:
        """Take note of a manifest that was replaced."""

    def _write_metadata(self, n_rows: int) -> dict[str, FileRecord]:
        """Write each `zarr.json` that is not as it should be; return their records."""
        assert self._manifest is not None
        files = metadata_files(self._manifest.header, n_rows)
        moves = []
        for key, content in files.items():
            target = self.path / key
            if not target.exists() or target.read_bytes() != content:
                make_folder(target.parent)
                moves.append((stage(self.partial, key, content), target))
        move_into_place(moves)
        return {key: _record(content) for key, content in files.items()}

    def commit(self, shard: WrittenShard) -> None:
        """Make a written shard part of the store: flush, rename, flush, and only then name it in the manifest."""
        assert self._manifest is not None
        written, entry = finish_shard(self._manifest.header, shard, self.partial)
        self._place({self.path / key: path for key, path in written.items()})
        self._add(entry)

    def _place(self, moves: Mapping[Path, Path]) -> None:
        for target in moves:
            make_folder(target.parent)
        move_into_place([(source, target) for target, source in moves.items()])

    def _add(self, entry: ShardRecord) -> None:
        assert self._manifest is not None
        self._append_entry(entry)
        self._manifest.shards.append(entry)

    def adopt(self) -> None:
        """Make staged shards part of the store, as long as the next one is among them.

        A kill may leave some files of one shard already in their places: they count as staged.
        """
        manifest = self._manifest
        assert manifest is not None
        while (staged := read_staged(self.path, manifest.header, len(manifest.shards))) is not None:
            self._place({self.path / key: path for key, path in staged.files.items() if path.exists()})
            for folder in {(self.path / key).parent: None for key in staged.files}:
                sync_folder(folder)  # of files that were moved before a kill too
            self._add(staged.record)
            remove_tree(staged.folder)

    @property
    def staged(self) -> dict[int, StagedShard]:
        """The staged shards, by number."""
        return list_staged(self.path, self._manifest.header) if self._manifest else {}

    def admit_ranks(self) -> None:
        """Share the lock with the processes of one group; every other writer is refused while one of them lives."""
        with disk_errors(self.path):
            lock(self._file, self.path, shared=True)

    def complete(self) -> None:
        """Write the merged statistics and the arrays' final shapes, then the manifest's last line."""
        manifest = self._manifest
        assert manifest is not None
        if manifest.completion is not None:
            return
        with disk_errors(self.path):
            header = manifest.header
            content = encode_statistics(merge_statistics(shard_statistics(LocalFiles(self.path), manifest), header))
            move_into_place([(stage(self.partial, STATISTICS, content), self.path / STATISTICS)])
            files = {STATISTICS: _record(content)}
            files |= self._write_metadata(manifest.n_contexts * header.context_size)
            self.clear_partial()
            self._clear_staged()
            entry = Completion(shards=len(manifest.shards), contexts=manifest.n_contexts, files=files)
            self._append_entry(entry)
            manifest.completion = entry

    def _append_entry(self, entry: ShardRecord | Completion) -> None:
        assert self._manifest is not None
        line, self._manifest.checksum = encode_line(entry, self._manifest.checksum)
        self._append(line)

    def _append(self, line: bytes) -> None:
        announce("append to the manifest")
        self._file.write(line)
        sync(self._file)

    def clear_partial(self) -> None:
        """Remove temporary files."""
        if self.partial.exists():
            remove_tree(self.partial)

    def _clear_staged(self) -> None:
        if (self.path / STAGED_FOLDER).exists():
            remove_tree(self.path / STAGED_FOLDER)

    def close(self) -> None:
        """Release the lock."""
        close(self._file)


def finish_shard(header: Header, shard: WrittenShard, partial: Path) -> tuple[dict[str, Path], ShardRecord]:
    """Flush a written shard and, in `partial`, its side files; return where each lies, and the shard's record."""
    number = shard.arrays.number
    keys = {array.name: array.shard_key(number) for array in arrays_of(header)}
    written, files = {}, {}
    for name, (path, n_bytes, checksum) in shard.arrays.finish().items():
        written[keys[name]] = path
        files[keys[name]] = FileRecord(n_bytes, checksum)
    sides = {
        statistics_key(number): encode_statistics(shard.statistics),
        provenance_key(number): encode_segments(join_segments(shard.segments), shard.info),
    }
    for key, content in sides.items():
        written[key] = stage(partial, key, content)
        files[key] = _record(content)
    return written, ShardRecord(shard=number, contexts=shard.n_contexts, files=files)


def check_free(store: Path) -> None:
    """Raise `StoreBusyError` if another process is writing to the store, before work that would be in vain."""
    if (store / MANIFEST).is_file():
        with (store / MANIFEST).open("rb") as file:
            lock(file, store)


def check_in_place(file: IO[bytes], store: Path) -> None:
    """Raise `StoreBusyError` if another writer replaced the manifest while this one waited for its lock."""
    if os.fstat(file.fileno()).st_ino != (store / MANIFEST).stat().st_ino:
        raise StoreBusyError(f"another process is writing to the store '{store}'; start the same command again")


def _record(content: bytes) -> FileRecord:
    return FileRecord(len(content), crc32c(content))


def check_same(manifest: Manifest, proposed: Header, path: Path | StoreUrl, resume: bool, free: set[str]) -> None:
    """Raise `StoreError` unless a store of the same settings, but for those left `free`, may be gone on with."""
    if not resume:
        raise StoreError(f"'{path}' already holds a store; remove it, name another path, or resume it")
    old, new = msgspec.to_builtins(manifest.header), msgspec.json.decode(msgspec.json.encode(proposed))
    for key in old | new:
        if key not in free and old.get(key) != new.get(key):
            raise StoreError(
                f"the store '{path}' was begun with {key} = {old.get(key)!r}, now asked for {new.get(key)!r}; "
                "use the same settings, or name another path"
            )
