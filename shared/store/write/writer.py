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
from ..local.shard_file import ShardInProgress
from ..local.store_folder import StoreFolder
from .assembly import ShardAssembly
from .assignment import ShardAssignment
from .batch import Batch
from .pipeline import Pipeline
from .sink import ShardSink

PENDING_BYTES = 256 << 20


class ActivationStoreWriter:
    """Append contexts of activations to a store; compression and writing go on behind the caller.

    Memory stays within `pending_bytes` of rows and their compressed copies, one chunk per hook point, one shard's
    tokens and provenance, and one batch converted to the stored dtype; with covariances, as many rows again and
    a matrix of float64 per hook point and shard in progress.

    A store that was declared with another number of contexts can be extended: with `keep_contexts`, the first append
    declares it with `n_contexts` and `metadata`, and keeps the shards that lie wholly within so many contexts. Until
    then it is what it was.

    A context manager: leaving it normally completes the store, leaving it by an exception keeps the committed shards,
    so that the same program can go on with context number `n_committed_contexts`.

    Raises:
        ConfigError: the settings or a batch are not acceptable.
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
        covariance: bool = False,
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
            covariance=covariance,
            has_roles=roles,
        )
        self.path = locate(path)
        self.raw_bytes = 0
        self._cache = cache
        self._keep_contexts = keep_contexts
        self._sink = self._open_sink(header, resume, codec_level is None)
        self._header: Header | None = self._sink.header
        self._beside: dict[str, bytes] = {}
        self._proposed = header
        self.n_committed_contexts = self._sink.n_contexts
        self._n_contexts = self.n_committed_contexts
        self._may_append = self._sink.may_append
        self._closed = False
        self._assembly: ShardAssembly | None = None
        self._open_shards: list[ShardInProgress] = []
        disk = self.path if isinstance(self.path, Path) else self._sink.partial.parent
        self._pipeline = Pipeline(disk, threads or min(os.cpu_count() or 1, 8), pending_bytes)

    @property
    def n_contexts(self) -> int:
        """Contexts in the store and on their way into it."""
        return self._n_contexts

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the store."""
        return (self._header or self._proposed).metadata

    @property
    def assignment(self) -> ShardAssignment:
        """Which contexts this writer is to be given: all that are not committed."""
        return ShardAssignment(self._proposed.contexts_per_shard, self.n_committed_contexts)

    @property
    def bytes_written(self) -> int:
        """Compressed bytes that this writer has written so far; `raw_bytes` counts what they were made from."""
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
        """Append whole contexts: `[n, context, d_in]` per hook point, with `[n, context]` tokens if any are stored.

        `held_out` ([n] bool) marks contexts that are never trained on; `documents` ([n, context] int64, -1 for none)
        and `positions` ([n, context], the token's place in its document) are kept as provenance, with each document's
        64-bit hash and name where `document_info` gives them. A writer made with `roles=True` needs `roles`
        ([n, context], codes of `shared.store.roles.ROLE_NAMES`): rows of role 0 are masked, and readers can be limited
        to some roles. Without `copy`, the activations must never change
        afterwards: whole chunks of them are stored from where they are.
        """
        if self._closed:
            raise StoreError(f"the writer of '{self.path}' is closed; open the store again to append")
        self._pipeline.check()
        header = self._start(tokens is not None)
        batch = Batch.of(header, self._n_contexts, activations, tokens, held_out, documents, positions, roles)
        batch.lasting = not copy
        self._check_room(batch.n)
        start = 0
        while start < batch.n:
            if self._assembly is None:
                self._assembly = ShardAssembly(header, self._n_contexts // header.contexts_per_shard, self._sink)
                self._open_shards.append(self._assembly.shard)
            stop = min(batch.n, start + header.contexts_per_shard - self._assembly.n_contexts)
            self._assembly.add(batch, start, stop, document_info or {}, self._pipeline)
            self._n_contexts += stop - start
            start = stop
            if self._assembly.n_contexts == header.contexts_per_shard:
                self._finish_shard()
        self.raw_bytes += sum(rows.nbytes for rows in batch.rows.values())

    def close(self) -> None:
        """Write what is left and complete the store; raise what went wrong in the background."""
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
        """Commit the whole shards that are on their way, drop the one in progress, and leave the store unfinished."""
        if self._closed:
            return
        self._closed = True
        self._pipeline.close()
        for shard in self._open_shards:
            shard.abandon()
        self._sink.clear_partial()
        self._sink.close()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the store, or after an exception abandon the shard in progress."""
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _open_sink(self, proposed: Header, resume: bool, any_level: bool) -> ShardSink:
        if isinstance(self.path, Path):
            return StoreFolder.open(self.path, proposed, resume, any_level, keep_contexts=self._keep_contexts)
        from ..remote.remote_folder import open_remote

        return open_remote(self.path, proposed, resume, any_level, self._cache, keep_contexts=self._keep_contexts)

    def write_beside(self, name: str, content: str | bytes) -> None:
        """Write a file that the manifest does not name into the store's folder or below its URL.

        There it waits until the store is begun: a prefix with other objects and no store is refused to a writer.
        """
        content = content.encode() if isinstance(content, str) else content
        if isinstance(self.path, Path):
            target = self.path / name
            with disk_errors(self.path):
                make_folder(target.parent)
                move_into_place([(stage(self._sink.partial, name, content), target)])
        elif self._header is None:
            self._beside[name] = content
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
        for name, content in self._beside.items():
            self.write_beside(name, content)
        return header

    def _check_room(self, n: int) -> None:
        limit = self._proposed.n_contexts
        if not self._may_append:
            raise StoreError(
                f"the store '{self.path}' is complete with {self._n_contexts} contexts; name another path to store more"
            )
        if limit is not None and self._n_contexts + n > limit:
            raise StoreError(f"the store '{self.path}' was declared with {limit} contexts; got {self._n_contexts + n}")

    def _finish_shard(self) -> None:
        assert self._assembly is not None
        assembly, self._assembly = self._assembly, None
        assembly.finish(self._pipeline)
        self._pipeline.then(lambda: self._open_shards.remove(assembly.shard))
