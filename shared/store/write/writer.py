"""Write activations, from any source, to a store: `ActivationStoreWriter`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from msgspec.structs import replace

from ...core.errors import ConfigError, StoreError
from ...core.location import StoreUrl, locate
from ..format.layout import CHUNK_BYTES, SHARD_BYTES, Header, make_header
from ..local.durable import disk_errors, make_folder, move_into_place, stage
from ..local.shard_writer import ShardInProgress
from ..local.store_folder import StoreFolder
from .assembly import ChunkBuffers, ShardAssembly
from .assignment import ShardAssignment
from .batch import ActivationBatch
from .pipeline import Pipeline
from .sink import ShardSink

PENDING_BYTES = 256 << 20


class ActivationStoreWriter:
    """Append contexts of activations to a store; they are compressed and written in the background.

    Memory use is bounded by `pending_bytes` of rows and their compressed copies, one chunk per hook point, one shard's
    tokens and provenance, and one batch converted to the stored dtype.

    A store that was declared with another number of contexts can be extended: with `keep_contexts`, the first append
    declares it anew with `n_contexts` and `metadata`, and keeps the shards that lie entirely within the first
    `keep_contexts` contexts. Until then the store is unchanged.

    The writer is a context manager. Leaving it normally completes the store. Leaving it by an exception keeps the
    committed shards, so that the same program can resume with context number `n_committed_contexts`.

    Raises:
        ConfigError: a setting or a batch is not acceptable.
        StoreBusyError: another process is writing to the store.
        StoreError: the path holds something else, or a store with other settings.
        NonFiniteError: a batch holds NaN or infinity.
        DiskSpaceError: the disk is full.
    """

    def __init__(
        self,
        path: str | Path | StoreUrl,
        hook_points: Mapping[str, int],
        context_size: int,
        *,
        dtype: str = "bfloat16",
        codec: str = "lz4",
        codec_level: int | None = None,
        mask_token_ids: Sequence[int] = (),
        metadata: Mapping[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
        n_contexts: int | None = None,
        resume: bool = True,
        threads: int | None = None,
        pending_bytes: int = PENDING_BYTES,
        roles: bool = False,
        cache: str | Path | None = None,
        keep_contexts: int | None = None,
    ) -> None:
        header = make_header(
            hook_points,
            context_size,
            dtype=dtype,
            codec=codec,
            codec_level=codec_level,
            mask_token_ids=mask_token_ids,
            metadata=metadata or {},
            n_contexts=n_contexts,
            has_tokens=False,
            chunk_bytes=chunk_bytes,
            shard_bytes=shard_bytes,
            has_roles=roles,
        )
        self.path = locate(path)
        self.raw_bytes = 0
        self._sink, self.assignment = self._open(header, resume, codec_level is None, cache, keep_contexts)
        """Which contexts this writer expects: `assignment.parts`."""
        self._header: Header | None = self._sink.header
        self._files_beside: dict[str, bytes] = {}
        self._proposed = header
        self.n_committed_contexts = self._sink.n_contexts
        self._n_contexts = self.assignment.first_context(0)
        self._may_append = self._sink.may_append
        self._closed = False
        self._assembly: ShardAssembly | None = None
        self._open_shards: list[ShardInProgress] = []
        disk = self.path if isinstance(self.path, Path) else self._sink.partial.parent
        self._pipeline = Pipeline(disk, threads or min(os.cpu_count() or 1, 8), pending_bytes)
        self._free_buffers = ChunkBuffers()

    @property
    def n_contexts(self) -> int:
        """The number of the next context to append."""
        return self._n_contexts

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the store."""
        return (self._header or self._proposed).metadata

    @property
    def bytes_written(self) -> int:
        """Compressed bytes that this writer has written so far; `raw_bytes` counts the rows before compression."""
        return self._pipeline.bytes_written

    def append(
        self,
        activations: Mapping[str, Any],
        tokens: Any = None,
        *,
        held_out: Any = None,
        documents: Any = None,
        positions: Any = None,
        roles: Any = None,
        document_info: Mapping[int, tuple[int, str]] | None = None,
        copy: bool = True,
    ) -> None:
        """Append whole contexts: `[n, context, d_in]` per hook point, and `[n, context]` tokens if any are stored.

        `held_out` (bool [n]) marks contexts that are never trained on. `documents` (int64 [n, context], -1 for none)
        and `positions` ([n, context], a token's position in its document) are kept as provenance, with each document's
        64-bit hash and name if `document_info` has them. A writer made with `roles=True` needs `roles` ([n, context],
        indices into `ROLE_NAMES`): rows of role 0 are masked, and readers can be limited to some roles.

        With `copy=False` the caller promises never to change the activations again: whole chunks are then stored
        without being copied first.
        """
        if self._closed:
            raise StoreError(f"the writer of '{self.path}' is closed; open the store again to append")
        self._pipeline.check()
        header = self._start(tokens is not None)
        batch = ActivationBatch.of(header, self._n_contexts, activations, tokens, held_out, documents, positions, roles)
        batch.lasting = not copy
        self._check_room(batch.n)
        start = 0
        while start < batch.n:
            if self._assembly is None:
                self._assembly = ShardAssembly(
                    header,
                    self._n_contexts // header.contexts_per_shard,
                    self._sink,
                    self._pipeline,
                    self._free_buffers,
                )
                self._open_shards.append(self._assembly.shard)
            stop = min(batch.n, start + header.contexts_per_shard - self._assembly.n_contexts)
            self._assembly.add(batch, start, stop, document_info or {})
            self._n_contexts += stop - start
            start = stop
            if self._assembly.n_contexts == header.contexts_per_shard:
                self._finish_shard()
        self.raw_bytes += sum(rows.nbytes for rows in batch.rows.values())

    def close(self) -> None:
        """Write the remaining contexts and complete the store; raises errors of the background threads."""
        if self._closed:
            return
        try:
            if self._assembly is not None:
                self._finish_shard()
            self._pipeline.close()
            self._pipeline.check()
            if self._header is None:
                self._begin_store(has_tokens=False)
            self._sink.complete()
        except BaseException:
            self.abandon()
            raise
        self._closed = True
        self._sink.close()

    def abandon(self) -> None:
        """Commit the full shards that are still pending, drop the one in progress, and leave the store unfinished."""
        if self._closed:
            return
        self._closed = True
        self._pipeline.close()
        for shard in self._open_shards:
            shard.abandon()
        self._sink.clear_partial()
        self._sink.close()

    def __enter__(self) -> Self:
        """Return this writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Call `close`, or `abandon` after an exception."""
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _open(
        self, proposed: Header, resume: bool, any_level: bool, cache: str | Path | None, keep_contexts: int | None
    ) -> tuple[ShardSink, ShardAssignment]:
        """Open the store; return where shards are committed to, and which contexts this writer expects."""
        sink: ShardSink
        if isinstance(self.path, Path):
            sink = StoreFolder.open(self.path, proposed, resume, any_level, keep_contexts=keep_contexts)
        else:
            from ..remote.remote_folder import open_remote

            sink = open_remote(self.path, proposed, resume, any_level, cache, keep_contexts=keep_contexts)
        return sink, ShardAssignment(proposed.contexts_per_shard, sink.n_contexts)

    def write_beside(self, name: str, content: str | bytes) -> None:
        """Write a file that the manifest does not name into the store's folder or below its URL.

        Below a URL it is written only once the store is begun, because writers refuse a prefix that holds other
        objects but no store.
        """
        content = content.encode() if isinstance(content, str) else content
        if isinstance(self.path, Path):
            target = self.path / name
            with disk_errors(self.path):
                make_folder(target.parent)
                move_into_place([(stage(self._sink.partial, name, content), target)])
        elif self._header is None:
            self._files_beside[name] = content
        else:
            from ..remote.objects import RemoteStore

            RemoteStore(self.path).put(name, content)

    def _start(self, has_tokens: bool) -> Header:
        header = self._header or self._begin_store(has_tokens)
        if header.has_tokens != has_tokens:
            expected, got = ("tokens", "none") if header.has_tokens else ("no tokens", "tokens")
            raise ConfigError(f"the store '{self.path}' was begun with {expected}; got a batch with {got}")
        return header

    def _begin_store(self, has_tokens: bool) -> Header:
        header = self._header = self._sink.start(replace(self._proposed, has_tokens=has_tokens))
        for name, content in self._files_beside.items():
            self.write_beside(name, content)
        return header

    def _check_room(self, n: int) -> None:
        limit = self._proposed.n_contexts
        if not self._may_append:
            raise StoreError(
                f"the store '{self.path}' is complete with {self._n_contexts} contexts; "
                "choose another path to store more"
            )
        if limit is not None and self._n_contexts + n > limit:
            raise StoreError(f"the store '{self.path}' was declared with {limit} contexts; got {self._n_contexts + n}")

    def _finish_shard(self) -> None:
        assert self._assembly is not None
        assembly, self._assembly = self._assembly, None
        assembly.finish()
        self._pipeline.then(lambda: self._open_shards.remove(assembly.shard))
        self._n_contexts = self.assignment.first_context(self._n_contexts)
