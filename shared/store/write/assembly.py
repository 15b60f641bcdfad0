"""Gather contexts into chunks and shards, and send each full chunk to the pipeline."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from ..format.bits import BITS
from ..format.layout import ROLES, TOKENS, ArrayLayout, Header, arrays_of
from ..format.moments import Moments
from ..format.provenance import Segments, find_segments
from ..format.roles import N_ROLES, PLACED, TEXT
from ..format.statistics import Statistics, add_by_role, moments_of_roles
from ..local.shard_writer import ShardInProgress, WrittenShard
from .batch import ActivationBatch
from .encode import EncodedChunk, encode_hook_chunk, encode_integers
from .pipeline import Pipeline
from .sink import ShardSink


class ChunkBuffers:
    """Chunk buffers that are reused, by shape and dtype: fresh memory costs a page fault for every 4 KiB of it."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, int], np.dtype], list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """Return a buffer with undefined content."""
        with self._lock:
            free = self._free.get((shape, dtype))
            return free.pop() if free else np.empty(shape, dtype)

    def give_back(self, buffer: np.ndarray) -> None:
        """Return a buffer that is no longer read."""
        with self._lock:
            self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)


class ShardAssembly:
    """The shard being filled: one buffer of a chunk per hook point, and what its side files will need.

    Full chunks go to `pipeline`; the shard is committed to `sink` after the last of them is written.
    """

    def __init__(
        self, header: Header, number: int, sink: ShardSink, pipeline: Pipeline, free_buffers: ChunkBuffers
    ) -> None:
        self.n_contexts = 0
        self._header = header
        self._sink = sink
        self._pipeline = pipeline
        self._free_buffers = free_buffers
        self._number = number
        arrays = arrays_of(header)
        self.shard = ShardInProgress(number, sink.partial, {array.name: array.chunks_per_shard for array in arrays})
        self._arrays = {array.name: array for array in arrays}
        self._fill = 0
        self._buffers: dict[str, np.ndarray] = {}
        self._training_roles = np.empty(header.chunk_rows, dtype=np.int8)  # PLACED: not trained on
        self._tokens: list[np.ndarray] = []
        self._roles: list[np.ndarray] = []
        self._held_out: list[np.ndarray] = []
        self._role_rows: list[np.ndarray] = []
        self._segments: list[Segments] = []
        self._info: dict[int, tuple[int, str]] = {}
        self._moments = {name: Moments.none(d_in) for name, d_in in header.hook_points.items()}
        self._by_role = {name: moments_of_roles(header, d_in) for name, d_in in header.hook_points.items()}

    def add(self, batch: ActivationBatch, start: int, stop: int, info: Mapping[int, tuple[int, str]]) -> None:
        """Add contexts [start, stop) of a batch, which must fit into the shard."""
        header = self._header
        first = self._number * header.contexts_per_shard + self.n_contexts
        held_out = batch.held_out[start:stop]
        segments = find_segments(batch.documents[start:stop], batch.positions[start:stop], held_out, first)
        self._segments.append(segments)
        self._info |= {key: info[key] for key in np.unique(segments.document).tolist() if key in info}
        self._held_out.append(held_out)
        if batch.tokens is not None:
            self._tokens.append(batch.tokens[start:stop].reshape(-1))
        if batch.roles is not None:
            self._roles.append(batch.roles[start:stop].reshape(-1))
        training = batch.usable[start:stop] & ~held_out[:, None]
        roles = np.int8(TEXT) if batch.roles is None else batch.roles[start:stop]
        training_roles = np.where(training, roles, np.int8(PLACED)).reshape(-1)
        rows = {name: part[start:stop].reshape(-1, part.shape[-1]) for name, part in batch.rows.items()}
        done = 0
        while done < len(training_roles):
            n = min(len(training_roles) - done, header.chunk_rows - self._fill)
            part = {name: all_rows[done : done + n] for name, all_rows in rows.items()}
            if batch.lasting and n == header.chunk_rows:
                self._send_chunk(part, training_roles[done : done + n], None)
            else:
                self._copy(part, training_roles[done : done + n])
                if self._fill == header.chunk_rows:
                    self._send_buffers()
            done += n
        self.n_contexts += stop - start

    def finish(self) -> None:
        """Send the last, partial chunks, and have the shard committed after them."""
        if self._fill:
            self._send_buffers()
        for name, parts in ((TOKENS, self._tokens), (ROLES, self._roles)):
            if parts:
                self._send_integers(self._arrays[name], np.concatenate(parts))
        self._pipeline.then(self._commit)

    def _copy(self, rows: dict[str, np.ndarray], training_roles: np.ndarray) -> None:
        """Copy rows into the buffers, which have room for them."""
        if not self._fill:
            chunk_rows, bits = self._header.chunk_rows, BITS[self._header.dtype]
            self._buffers = {
                name: self._free_buffers.take((chunk_rows, part.shape[1]), bits) for name, part in rows.items()
            }
        filled = slice(self._fill, self._fill + len(training_roles))
        for name, part in rows.items():
            self._buffers[name][filled] = part
        self._training_roles[filled] = training_roles
        self._fill = filled.stop

    def _send_buffers(self) -> None:
        """Pad the buffers with zeros and send them to the pipeline."""
        self._training_roles[self._fill :] = PLACED
        for buffer in self._buffers.values():
            buffer[self._fill :] = 0
        self._send_chunk(self._buffers, self._training_roles.copy(), self._free_buffers)
        self._buffers = {}
        self._fill = 0

    def _send_chunk(self, rows: dict[str, np.ndarray], training_roles: np.ndarray, owner: ChunkBuffers | None) -> None:
        """Have a full chunk encoded and written; then its rows go back to `owner`, if there is one."""
        self._role_rows.append(np.bincount(training_roles, minlength=N_ROLES) * (np.arange(N_ROLES) != PLACED))
        for name, part in rows.items():

            def encode(name: str = name, part: np.ndarray = part) -> EncodedChunk:
                return encode_hook_chunk(self._header, self._arrays, name, part, training_roles)

            def write(chunk: EncodedChunk, name: str = name, part: np.ndarray = part) -> int:
                written = self._write_chunk(name, chunk)
                if owner is not None:
                    owner.give_back(part)
                return written

            self._pipeline.encode(encode, write, part.nbytes)

    def _write_chunk(self, name: str, chunk: EncodedChunk) -> int:
        self._moments[name] = self._moments[name] + chunk.moments
        self._by_role[name] = add_by_role(self._by_role[name], chunk.by_role)
        return self.shard.append(chunk.stored)

    def _send_integers(self, array: ArrayLayout, values: np.ndarray) -> None:
        """Have the shard's tokens or roles encoded and written."""
        for start in range(0, len(values), array.chunk_rows):
            part = values[start : start + array.chunk_rows]
            self._pipeline.encode(lambda part=part: encode_integers(array, part), self.shard.append, part.nbytes)

    def _commit(self) -> None:
        statistics = Statistics(
            self._moments,
            np.concatenate(self._held_out),
            np.array([rows.sum() for rows in self._role_rows], dtype=np.int64),
            self._by_role if self._header.has_roles else {},
            np.array(self._role_rows, dtype=np.int64) if self._header.has_roles else None,
        )
        self._sink.commit(WrittenShard(self.shard, self.n_contexts, statistics, self._segments, self._info))
