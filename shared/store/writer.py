"""Write activations, from any source, to a store: `ActivationStoreWriter`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..errors import ConfigError, StoreError
from .commit import StoreFolder
from .encode import encode_hook_chunk, encode_tokens
from .format import CHUNK_BYTES, MAX_ROWS, SHARD_BYTES, TOKENS, Header, arrays_of, make_header
from .moments import Moments
from .pipeline import Encoded, Pipeline, ShardInProgress
from .provenance import Segments, find_segments
from .rows import BITS, check_finite, to_bits
from .statistics import Statistics

PENDING_BYTES = 256 << 20


class ActivationStoreWriter:
    """Append contexts of activations to a store; compression and writing go on behind the caller.

    Memory stays within `pending_bytes` of rows and their compressed copies, one chunk per hook point, one shard's
    tokens and provenance, and one batch converted to the stored dtype.

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
        path: str | Path,
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
        )
        self.path = Path(path)
        self.raw_bytes = 0
        self._folder = StoreFolder.open(self.path, header, resume)
        self._header: Header | None = self._folder.header
        self._proposed = header
        self.n_committed_contexts = self._folder.n_contexts
        self._n_contexts = self.n_committed_contexts
        self._may_append = self._folder.may_append
        self._closed = False
        self._batch: _ShardBatch | None = None
        self._open_shards: list[ShardInProgress] = []
        self._pipeline = Pipeline(self.path, threads or min(os.cpu_count() or 1, 8), pending_bytes)

    @property
    def n_contexts(self) -> int:
        """Contexts in the store and on their way into it."""
        return self._n_contexts

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
        document_info: Mapping[int, tuple[int, str]] | None = None,
    ) -> None:
        """Append whole contexts: `[n, context, d_in]` per hook point, with `[n, context]` tokens if any are stored.

        `held_out` ([n] bool) marks contexts that are never trained on; `documents` ([n, context] int64, -1 for none)
        and `positions` ([n, context], the token's place in its document) are kept as provenance, with each document's
        64-bit hash and name where `document_info` gives them.
        """
        if self._closed:
            raise StoreError(f"the writer of '{self.path}' is closed; open the store again to append")
        self._pipeline.check()
        header = self._start(tokens is not None)
        batch = _Batch.of(header, self._n_contexts, activations, tokens, held_out, documents, positions)
        self._check_room(batch.n)
        start = 0
        while start < batch.n:
            if self._batch is None:
                self._batch = _ShardBatch(header, self._n_contexts // header.contexts_per_shard, self._folder)
                self._open_shards.append(self._batch.shard)
            stop = min(batch.n, start + header.contexts_per_shard - self._batch.n_contexts)
            self._batch.add(batch, start, stop, document_info or {}, self._pipeline)
            self._n_contexts += stop - start
            start = stop
            if self._batch.n_contexts == header.contexts_per_shard:
                self._finish_shard()
        self.raw_bytes += sum(rows.nbytes for rows in batch.rows.values())

    def close(self) -> None:
        """Write what is left and complete the store; raise what went wrong in the background."""
        if self._closed:
            return
        try:
            if self._batch is not None:
                self._finish_shard()
            self._pipeline.close()
            self._pipeline.check()
            if self._header is None:
                self._header = self._folder.start(self._proposed)
            self._folder.complete()
        except BaseException:
            self.abandon()
            raise
        self._closed = True
        self._folder.close()

    def abandon(self) -> None:
        """Commit the whole shards that are on their way, drop the one in progress, and leave the store unfinished."""
        if self._closed:
            return
        self._closed = True
        self._pipeline.close()
        for shard in self._open_shards:
            shard.abandon()
        self._folder.clear_partial()
        self._folder.close()

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

    def _start(self, has_tokens: bool) -> Header:
        if self._header is None:
            from msgspec.structs import replace

            self._header = self._folder.start(replace(self._proposed, has_tokens=has_tokens))
        if self._header.has_tokens != has_tokens:
            expected, got = ("tokens", "none") if self._header.has_tokens else ("no tokens", "tokens")
            raise ConfigError(f"the store '{self.path}' was begun with {expected}; got a batch with {got}")
        return self._header

    def _check_room(self, n: int) -> None:
        limit = self._proposed.n_contexts
        if not self._may_append:
            raise StoreError(
                f"the store '{self.path}' is complete with {self._n_contexts} contexts; name another path to store more"
            )
        if limit is not None and self._n_contexts + n > limit:
            raise StoreError(f"the store '{self.path}' was declared with {limit} contexts; got {self._n_contexts + n}")

    def _finish_shard(self) -> None:
        assert self._batch is not None
        batch, self._batch = self._batch, None
        batch.finish(self._pipeline)
        self._pipeline.then(lambda: self._open_shards.remove(batch.shard))


class _Batch:
    """A batch that was checked as a whole before any of it is stored."""

    def __init__(self, n: int, rows: dict[str, np.ndarray]) -> None:
        self.n = n
        self.rows = rows
        self.tokens: np.ndarray | None = None
        self.held_out = np.zeros(n, dtype=bool)
        self.usable = np.ones(0, dtype=bool)
        self.documents = np.zeros((0, 0), dtype=np.int64)
        self.positions = np.zeros((0, 0), dtype=np.int64)

    @classmethod
    def of(
        cls,
        header: Header,
        first_context: int,
        activations: Mapping[str, Any],
        tokens: Any,
        held_out: Any,
        documents: Any,
        positions: Any,
    ) -> _Batch:
        names = list(header.hook_points)
        if set(activations) != set(names):
            raise ConfigError(f"expected activations of {', '.join(names)}; got {', '.join(map(str, activations))}")
        n = len(next(iter(activations.values())))
        rows = {}
        for name, d_in in header.hook_points.items():
            expected, got = (n, header.context_size, d_in), tuple(activations[name].shape)
            if got != expected:
                raise ConfigError(f"hook point '{name}': expected activations of shape {expected}, got {got}")
            rows[name] = to_bits(activations[name], header.dtype, name)
            if n:
                check_finite(rows[name], header.dtype, name, first_context)
        batch = cls(n, rows)
        grid = (n, header.context_size)
        batch.usable = np.ones(grid, dtype=bool)
        if tokens is not None:
            batch.tokens = _integers("tokens", tokens, grid, np.int32)
            if header.mask_token_ids:
                batch.usable = ~np.isin(batch.tokens, header.mask_token_ids)
        if held_out is not None:
            batch.held_out = _integers("held_out", held_out, (n,), np.bool_)
        unknown = np.broadcast_to(np.int64(-1), grid)
        batch.documents = unknown if documents is None else _integers("documents", documents, grid, np.int64)
        batch.positions = unknown if positions is None else _integers("positions", positions, grid, np.int64)
        return batch


def _integers(what: str, values: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if array.shape != shape or array.dtype.kind not in "iub":
        raise ConfigError(f"expected {what} of integers of shape {shape}, got {array.dtype} of shape {array.shape}")
    if (
        dtype != np.bool_
        and array.size
        and not -(MAX_ROWS << 14) <= int(array.min()) <= int(array.max()) <= (np.iinfo(dtype).max)
    ):
        raise ConfigError(f"expected {what} that fit {np.dtype(dtype)}, got up to {int(array.max())}")
    return array.astype(dtype)


class _ShardBatch:
    """The shard being filled: buffers of one chunk per hook point, and what is known of its contexts."""

    def __init__(self, header: Header, number: int, folder: StoreFolder) -> None:
        self.n_contexts = 0
        self._header = header
        self._folder = folder
        self._number = number
        arrays = arrays_of(header)
        self.shard = ShardInProgress(number, folder.partial, {array.name: array.chunks_per_shard for array in arrays})
        self._arrays = {array.name: array for array in arrays}
        self._fill = 0
        self._new_buffers()
        self._tokens: list[np.ndarray] = []
        self._held_out: list[np.ndarray] = []
        self._training_rows: list[int] = []
        self._segments: list[Segments] = []
        self._info: dict[int, tuple[int, str]] = {}
        self._moments = {name: Moments.none(d_in) for name, d_in in header.hook_points.items()}

    def _new_buffers(self) -> None:
        shape = self._header.chunk_rows
        bits = BITS[self._header.dtype]
        self._buffers = {name: np.empty((shape, d_in), bits) for name, d_in in self._header.hook_points.items()}
        self._training = np.empty(shape, dtype=bool)

    def add(
        self, batch: _Batch, start: int, stop: int, info: Mapping[int, tuple[int, str]], pipeline: Pipeline
    ) -> None:
        """Take contexts [start, stop) of a batch; they fit the shard."""
        header = self._header
        first = self._number * header.contexts_per_shard + self.n_contexts
        held_out = batch.held_out[start:stop]
        segments = find_segments(batch.documents[start:stop], batch.positions[start:stop], held_out, first)
        self._segments.append(segments)
        self._info |= {key: info[key] for key in np.unique(segments.document).tolist() if key in info}
        self._held_out.append(held_out)
        if batch.tokens is not None:
            self._tokens.append(batch.tokens[start:stop].reshape(-1))
        training = (batch.usable[start:stop] & ~held_out[:, None]).reshape(-1)
        rows = {name: part[start:stop].reshape(-1, part.shape[-1]) for name, part in batch.rows.items()}
        done = 0
        while done < len(training):
            n = min(len(training) - done, header.chunk_rows - self._fill)
            for name, part in rows.items():
                self._buffers[name][self._fill : self._fill + n] = part[done : done + n]
            self._training[self._fill : self._fill + n] = training[done : done + n]
            self._fill += n
            done += n
            if self._fill == header.chunk_rows:
                self._send_chunk(pipeline)
        self.n_contexts += stop - start

    def _send_chunk(self, pipeline: Pipeline) -> None:
        """Hand the filled buffers to the background; a last, partial chunk is padded with zeros."""
        self._training[self._fill :] = False
        self._training_rows.append(int(self._training.sum()))
        for name, buffer in self._buffers.items():
            buffer[self._fill :] = 0
            pipeline.encode(
                lambda name=name, buffer=buffer, training=self._training: (
                    name,
                    *encode_hook_chunk(self._header, self._arrays, name, buffer, training),
                ),
                self._write_chunk,
                buffer.nbytes,
            )
        self._fill = 0
        self._new_buffers()

    def _write_chunk(self, result: tuple[str, Encoded, Moments]) -> int:
        name, encoded, moments = result
        self._moments[name] = self._moments[name] + moments
        return self.shard.append(encoded)

    def finish(self, pipeline: Pipeline) -> None:
        """Send what is left, and have the shard committed after it."""
        if self._fill:
            self._send_chunk(pipeline)
        if self._tokens:
            tokens = np.concatenate(self._tokens)
            rows = self._arrays[TOKENS].chunk_rows
            for start in range(0, len(tokens), rows):
                part = tokens[start : start + rows]
                pipeline.encode(
                    lambda part=part: encode_tokens(self._arrays[TOKENS], part), self.shard.append, part.nbytes
                )
        pipeline.then(self._commit)

    def _commit(self) -> None:
        statistics = Statistics(
            self._moments, np.concatenate(self._held_out), np.array(self._training_rows, dtype=np.int64)
        )
        self._folder.commit(self.shard, self.n_contexts, statistics, self._segments, self._info)
