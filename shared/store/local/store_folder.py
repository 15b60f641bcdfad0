"""A store's folder as its writer sees it: lock the store, begin it, commit shard after shard, complete it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import msgspec
from msgspec.structs import replace

from ...core.errors import ConfigError, StoreBusyError, StoreError
from ...core.location import StoreUrl
from ..format.layout import (
    MANIFEST,
    PARTIAL_FOLDER,
    STAGED_FOLDER,
    STATISTICS,
    Header,
    shard_keys,
)
from ..format.manifest import Completion, FileRecord, Manifest, ShardRecord, encode_line, read_manifest
from ..format.statistics import encode_statistics, merge_statistics
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
from .shard_writer import WrittenShard
from .staged_shards import StagedShard, drop_unusable, list_staged, read_staged
from .store_files import LocalFiles, shard_statistics

RECOVERED_SHARDS = 4
"""How many shards after the last one in the manifest are searched for files that a killed writer left behind."""


class StoreFolder:
    """A store's folder, locked for this process until `close`.

    `on_commit` is called with the record of each shard that was just added to the manifest. `faults` has one line per
    staged shard that was damaged and therefore dropped.
    """

    def __init__(
        self, path: Path, file: IO[bytes], manifest: Manifest | None, keep_contexts: int | None = None
    ) -> None:
        self.path = path
        self.partial = path / PARTIAL_FOLDER
        self.faults: list[str] = []
        self.on_commit: Callable[[ShardRecord], object] = lambda record: None
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
        """Lock the store at `path`, create its folder if needed, and clean up after a killed writer.

        Staged shards that follow the committed ones directly become part of the store. Those behind a gap are removed
        unless `keep_staged`.

        A store that was declared with another number of contexts is refused unless `keep_contexts` is given. Then
        `start` declares it anew and keeps the shards that lie entirely within the first `keep_contexts` contexts.
        """
        if path.exists() and not path.is_dir():
            raise StoreError(f"expected a folder for the store, got a file at '{path}'; choose another path")
        if path.is_dir() and not (path / MANIFEST).exists() and any(path.iterdir()):
            raise StoreError(f"'{path}' holds other files and no store; choose an empty or new folder")
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
                            f"the store '{path}' was begun with {manifest.header.n_contexts} contexts and holds staged "
                            "shards of several ranks; resume it with that number of contexts before you extend it"
                        )
                folder = cls(path, file, manifest, keep_contexts)
                folder._recover(keep_staged)
            except BaseException:
                close(file)
                raise
        return folder

    @property
    def header(self) -> Header | None:
        """The store's header, or None until `start` begins the store or declares it anew."""
        return self._manifest.header if self._manifest and self._keep_shards is None else None

    @property
    def manifest(self) -> Manifest:
        """The manifest of a store that was begun."""
        assert self._manifest is not None
        return self._manifest

    @property
    def n_contexts(self) -> int:
        """Contexts in the committed shards that are kept."""
        if self._manifest is not None and self._keep_shards is not None:
            return self._keep_shards * self._manifest.header.contexts_per_shard
        return self._manifest.n_contexts if self._manifest else 0

    @property
    def may_append(self) -> bool:
        """Whether more shards may follow."""
        manifest = self._manifest
        if self._keep_shards is not None:
            return True
        if manifest is None or not manifest.shards:
            return manifest is None or manifest.completion is None
        return manifest.completion is None and manifest.shards[-1].contexts == manifest.header.contexts_per_shard

    def _recover(self, keep_staged: bool) -> None:
        """Cut a torn last line off the manifest, adopt staged shards, and remove files that the manifest lacks."""
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
        """Remove the files of the `n_shards` shards after the last one in the manifest."""
        first = len(self.manifest.shards)
        for shard in range(first, first + n_shards):
            for key in shard_keys(self.manifest.header, shard):
                (self.path / key).unlink(missing_ok=True)

    def start(self, header: Header) -> Header:
        """Begin the store, or declare it anew: write the manifest's header, then the metadata of the arrays."""
        if self._keep_shards is not None:
            return self._declare_anew(header, self._keep_shards)
        with disk_errors(self.path):
            try:
                line, checksum = encode_line(header, 0)
            except (TypeError, msgspec.MsgspecError, ValueError) as error:
                raise ConfigError(f"expected metadata that can be written as JSON; {error}") from None
            self._append(line)
            sync_folder(self.path)
            self._manifest = Manifest(header, shards=[], n_bytes=len(line), checksum=checksum)
            self._write_metadata(0)
        return header

    def _declare_anew(self, header: Header, n_shards: int) -> Header:
        """Replace the manifest by one with another header and only the first shards, then remove the other files.

        Until the manifest is replaced, in one step, the old store is intact; from then on the new one can be resumed.
        """
        old = self.manifest
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
                lock(file, self.path)  # before it is in place, so that no other writer can lock it first
                move_into_place([(staged, self.path / MANIFEST)])
            except BaseException:
                close(file)
                raise
            close(self._file)
            self._file, self._manifest, self._keep_shards = file, manifest, None
            self._write_metadata(0)
            (self.path / STATISTICS).unlink(missing_ok=True)
            self._remove_unnamed(len(old.shards) - n_shards)
        return header

    def _write_metadata(self, n_rows: int) -> dict[str, FileRecord]:
        """Write each `zarr.json` whose content differs; return the records of all."""
        files = metadata_files(self.manifest.header, n_rows)
        moves = []
        for key, content in files.items():
            target = self.path / key
            if not target.exists() or target.read_bytes() != content:
                make_folder(target.parent)
                moves.append((stage(self.partial, key, content), target))
        move_into_place(moves)
        return {key: FileRecord.of(content) for key, content in files.items()}

    def commit(self, shard: WrittenShard) -> None:
        """Add a written shard to the store: flush and rename its files, flush the folders, append to the manifest."""
        written, record = shard.finish(self.manifest.header, self.partial)
        self._move({self.path / key: path for key, path in written.items()})
        self._add(record)

    def _move(self, moves: Mapping[Path, Path]) -> None:
        for target in moves:
            make_folder(target.parent)
        move_into_place([(source, target) for target, source in moves.items()])

    def _add(self, record: ShardRecord) -> None:
        self._append_entry(record)
        self.manifest.shards.append(record)
        self.on_commit(record)

    def adopt(self) -> None:
        """Add staged shards to the store, in order, up to the first that is missing.

        After a kill, some files of the next shard may already have their final names: they count as staged.
        """
        manifest = self.manifest
        while (staged := read_staged(self.path, manifest.header, len(manifest.shards))) is not None:
            self._move({self.path / key: path for key, path in staged.files.items() if path.exists()})
            for folder in {(self.path / key).parent: None for key in staged.files}:
                sync_folder(folder)  # also for files that were renamed before a kill
            self._add(staged.record)
            remove_tree(staged.folder)

    @property
    def staged(self) -> dict[int, StagedShard]:
        """The staged shards, by number."""
        return list_staged(self.path, self._manifest.header) if self._manifest else {}

    def admit_ranks(self) -> None:
        """Share the lock with the ranks of one group; other writers are refused while any of the ranks lives."""
        with disk_errors(self.path):
            lock(self._file, self.path, shared=True)

    def complete(self) -> None:
        """Write the merged statistics and the arrays' final shapes, then the manifest's last line."""
        manifest = self.manifest
        if manifest.completion is not None:
            return
        with disk_errors(self.path):
            header = manifest.header
            content = encode_statistics(merge_statistics(shard_statistics(LocalFiles(self.path), manifest), header))
            move_into_place([(stage(self.partial, STATISTICS, content), self.path / STATISTICS)])
            files = {STATISTICS: FileRecord.of(content)}
            files |= self._write_metadata(manifest.n_contexts * header.context_size)
            self.clear_partial()
            self._clear_staged()
            entry = Completion(shards=len(manifest.shards), contexts=manifest.n_contexts, files=files)
            self._append_entry(entry)
            manifest.completion = entry

    def _append_entry(self, entry: ShardRecord | Completion) -> None:
        line, self.manifest.checksum = encode_line(entry, self.manifest.checksum)
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


def check_free(store: Path) -> None:
    """Raise `StoreBusyError` if another process is writing to the store: a check before long work, not a lock."""
    if (store / MANIFEST).is_file():
        with (store / MANIFEST).open("rb") as file:
            lock(file, store)


def check_in_place(file: IO[bytes], store: Path) -> None:
    """Raise `StoreBusyError` if another writer replaced the manifest before this one locked it."""
    if os.fstat(file.fileno()).st_ino != (store / MANIFEST).stat().st_ino:
        raise StoreBusyError(f"another process is writing to the store '{store}'; run the same command again")


def check_same(manifest: Manifest, proposed: Header, path: Path | StoreUrl, resume: bool, free: set[str]) -> None:
    """Raise `StoreError` unless the store may be resumed: the same settings, except for the keys in `free`."""
    if not resume:
        raise StoreError(f"'{path}' already holds a store; remove it, choose another path, or resume it")
    if manifest.header.covariance:
        raise StoreError(
            f"the store '{path}' keeps covariances, which this version can read but not write; choose another path"
        )
    old, new = msgspec.to_builtins(manifest.header), msgspec.json.decode(msgspec.json.encode(proposed))
    for key in old | new:
        if key not in free and old.get(key) != new.get(key):
            raise StoreError(
                f"the store '{path}' was begun with {key} = {old.get(key)!r}, now asked for {new.get(key)!r}; "
                "use the same settings, or choose another path"
            )
