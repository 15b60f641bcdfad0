"""The manifest: lines of JSON, each with a checksum that covers all lines up to it.

Lines are `{"entry": ..., "crc32c": "8 hex digits"}`: the header, one per committed shard in order, and a last one when
the store is complete. A last line without newline was cut off by a kill and does not count.
"""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Annotated

import msgspec

from ...core.errors import MissingFileError, StoreError
from ...core.location import StoreUrl
from .checksum import crc32c
from .layout import FORMAT_VERSION, MANIFEST, RESERVED_NAMES, ROLES, Count, Header, Size, check_hook_point_name

Checksum = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class FileRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A file's size, and the checksum of its content or, for a shard file, of its footer."""

    bytes: Count
    crc32c: Checksum

    @classmethod
    def of(cls, content: builtins.bytes) -> FileRecord:
        """Return the record of a file with this content."""
        return cls(len(content), crc32c(content))


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="shard", tag_field="type"):
    """A committed shard: its files by path in the store."""

    shard: Count
    contexts: Size
    files: dict[str, FileRecord]


class Completion(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="complete", tag_field="type"
):
    """The last line of a complete store: its totals, and the files that were written last."""

    shards: Count
    contexts: Count
    files: dict[str, FileRecord]


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    entry: msgspec.Raw
    crc32c: str


class Manifest(msgspec.Struct):
    """A parsed manifest. `n_bytes` is the size of its complete lines, `checksum` that of the last one."""

    header: Header
    shards: list[ShardRecord] = []
    completion: Completion | None = None
    n_bytes: int = 0
    checksum: int = 0

    @property
    def n_contexts(self) -> int:
        """Contexts in committed shards."""
        full = max(0, len(self.shards) - 1) * self.header.contexts_per_shard
        return full + self.shards[-1].contexts if self.shards else 0


def encode_line(entry: Header | ShardRecord | Completion, previous: int) -> tuple[bytes, int]:
    """Return an entry's line and its checksum, continued from the previous line's."""
    packed = msgspec.json.encode(entry)
    checksum = crc32c(packed, previous)
    return b'{"entry":%b,"crc32c":"%08x"}\n' % (packed, checksum), checksum


def read_manifest(store: Path) -> Manifest | None:
    """Return a store's manifest, or None while it has no header yet.

    Raises:
        MissingFileError: the path does not exist.
        StoreError: it is not a store, or its manifest is damaged.
    """
    path = store / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not store.exists():
            raise MissingFileError(f"no activation store at '{store}'; harvest one, or give the path of one") from None
        raise StoreError(f"'{store}' is not an activation store: it has no {MANIFEST}") from None
    except OSError as error:
        raise StoreError(f"cannot read '{path}': {error.strerror}") from None
    return manifest_of(store, content)


def manifest_of(location: Path | StoreUrl, content: bytes) -> Manifest | None:
    """Parse a store's manifest by `parse_manifest`; errors name the store."""
    try:
        return parse_manifest(content)
    except StoreError as error:
        raise StoreError(f"the store '{location}' is damaged: {MANIFEST} {error}") from None


def parse_manifest(content: bytes) -> Manifest | None:
    """Parse a manifest; return None if it has no complete line."""
    *lines, torn = content.split(b"\n")
    if not lines:
        return None
    manifest: Manifest | None = None
    checksum = 0
    for number, line in enumerate(lines, 1):
        entry, following = parse_line(line, checksum, number)
        checksum = following
        if manifest is None:
            if not isinstance(entry, Header):
                raise StoreError("line 1: expected the header")
            _check_header(entry)
            manifest = Manifest(entry, shards=[])
        else:
            _add(manifest, entry, number)
    assert manifest is not None
    if torn and manifest.completion is not None:
        raise StoreError(f"line {len(lines) + 1}: nothing may follow the last line")
    manifest.n_bytes = sum(len(line) + 1 for line in lines)
    manifest.checksum = checksum
    return manifest


def parse_line(line: bytes, previous: int, number: int) -> tuple[Header | ShardRecord | Completion, int]:
    """Return a line's entry and checksum, which continues `previous`; raise `StoreError` if the line is damaged."""
    try:
        raw = bytes(msgspec.json.decode(line, type=_Line).entry)
        checksum = crc32c(raw, previous)
        if line != b'{"entry":%b,"crc32c":"%08x"}' % (raw, checksum):
            raise StoreError(f"line {number} does not have its checksum")
        return msgspec.json.decode(raw, type=Header | ShardRecord | Completion), checksum
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise StoreError(f"line {number} is not an entry: {error}") from None


def _check_header(header: Header) -> None:
    if header.format_version != FORMAT_VERSION:
        raise StoreError(
            f"has format version {header.format_version}; this Thresher reads version {FORMAT_VERSION}: update it"
        )
    if not header.hook_points or header.shard_rows % header.chunk_rows or header.shard_rows % header.context_size:
        raise StoreError("line 1: shard_rows must be a multiple of chunk_rows and of context_size")
    for name in header.hook_points:
        try:
            check_hook_point_name(name, RESERVED_NAMES if header.has_roles else RESERVED_NAMES - {ROLES})
        except ValueError as error:
            raise StoreError(f"line 1: {error}") from None


def _add(manifest: Manifest, entry: Header | ShardRecord | Completion, number: int) -> None:
    """Add an entry; raise `StoreError` if it cannot follow the entries before it."""
    per_shard = manifest.header.contexts_per_shard
    if manifest.completion is not None or isinstance(entry, Header):
        raise StoreError(f"line {number}: nothing may follow the last line, and no second header")
    last_is_full = not manifest.shards or manifest.shards[-1].contexts == per_shard
    if isinstance(entry, ShardRecord):
        if entry.shard != len(manifest.shards) or not last_is_full or entry.contexts > per_shard:
            raise StoreError(f"line {number}: expected shard {len(manifest.shards)} of at most {per_shard} contexts")
        manifest.shards.append(entry)
        return
    if (entry.shards, entry.contexts) != (len(manifest.shards), manifest.n_contexts):
        raise StoreError(f"line {number}: its totals do not match the shards before it")
    manifest.completion = entry
