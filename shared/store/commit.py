"""A store's folder as the writer sees it: begun, locked, a shard committed at a time, completed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import msgspec

from ..errors import ConfigError, StoreError
from .checksum import crc32c
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
from .files import LocalFiles, shard_statistics
from .format import (
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
from .location import StoreUrl
from .manifest import Completion, FileRecord, Manifest, ShardRecord, encode_line, read_manifest
from .provenance import encode_segments, join_segments
from .sink import WrittenShard
from .staging import StagedShard, drop_unusable, list_staged, read_staged
from .statistics import encode_statistics, merge_statistics
from .zarr_metadata import metadata_files


class StoreFolder:
    """The folder, locked for this process until `close`."""

    def __init__(self, path: Path, file: IO[bytes], manifest: Manifest | None) -> None:
        self.path = path
        self.partial = path / PARTIAL_FOLDER
        self.faults: list[str] = []
        self._file = file
        self._manifest = manifest

    @classmethod
    def open(
        cls, path: Path, proposed: Header, resume: bool, any_level: bool, keep_staged: bool = False
    ) -> StoreFolder:
        """Lock the store at `path`, made if need be, and clear what a killed writer left half done.

        Shards that ranks staged directly behind the committed ones become part of the store; those behind a gap are
        kept if asked for, or else removed.
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
                manifest = read_manifest(path)
                if manifest is not None:
                    check_same(
                        manifest, proposed, path, resume, {"has_tokens", "codec_level"} if any_level else {"has_tokens"}
                    )
                folder = cls(path, file, manifest)
                folder._recover(keep_staged)
            except BaseException:
                close(file)
                raise
        return folder

    @property
    def header(self) -> Header | None:
        """The store's header, or None before the first batch."""
        return self._manifest.header if self._manifest else None

    @property
    def n_contexts(self) -> int:
        """Contexts in committed shards."""
        return self._manifest.n_contexts if self._manifest else 0

    @property
    def may_append(self) -> bool:
        """Whether more shards may follow: not after the last one."""
        manifest = self._manifest
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
            for key in shard_keys(manifest.header, len(manifest.shards)):
                (self.path / key).unlink(missing_ok=True)
        if not keep_staged:
            self._clear_staged()

    def start(self, header: Header) -> Header:
        """Begin the store: its header line, then the metadata of its arrays."""
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
