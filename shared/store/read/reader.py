"""Read a store: `ActivationStore`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int8, Int32, Int64
from torch import Tensor

from ...core.errors import ConfigError, HookPointError, StoreError
from ...core.location import StoreUrl, locate
from ..format.bits import TORCH_DTYPES, piece_bytes
from ..format.codecs import dequantise
from ..format.layout import ROLES, STATISTICS, TOKENS, arrays_of, provenance_key, scales_name
from ..format.manifest import Manifest
from ..format.moments import Moments, merge
from ..format.roles import PLACED, ROLE_NAMES, role_codes
from ..format.statistics import Statistics, merge_statistics
from ..local.store_files import StoreFiles, load_statistics, shard_statistics
from .open import open_files

Verify = Literal["first", "always", "never"]


class ActivationStore:
    """A store of activations, opened for reading; safe to use from several threads.

    Open it with `ActivationStore.open(path)`, the path a folder or a URL such as `s3://bucket/prefix`. Rows are in
    sequence order: row `r` is position `r % context_size` of context `r // context_size`. A store whose harvest was
    cut off is readable as far as it was committed.
    """

    def __init__(self, files: StoreFiles, manifest: Manifest, verify: Verify, threads: int | None) -> None:
        header = manifest.header
        self.files = files
        self._reopen: tuple[Any, ...] = (str(files.location), verify, threads, None, None, None)
        self.path: Path | StoreUrl = files.location
        self.hook_points = tuple(header.hook_points)
        self.context_size = header.context_size
        self.n_contexts = manifest.n_contexts
        self.n_rows = self.n_contexts * self.context_size
        self.chunk_rows = header.chunk_rows
        self.shard_rows = header.shard_rows
        self.n_chunks = -(-self.n_rows // self.chunk_rows)
        self.dtype = TORCH_DTYPES[header.dtype]
        self.codec = header.codec
        self.metadata: dict[str, Any] = header.metadata
        self.mask_token_ids = tuple(header.mask_token_ids)
        self.has_tokens = header.has_tokens
        self.has_roles = header.has_roles
        self.used_roles: tuple[str, ...] | None = None
        """Names of the roles whose rows may be used; None for all."""
        self._used_codes: tuple[int, ...] = ()
        self.complete = manifest.completion is not None
        self.manifest = manifest
        self._verify: Verify = verify
        self._threads = threads or max(min(os.cpu_count() or 1, 16), files.threads)
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._caches = {array.name: files.shard_cache(array, manifest) for array in arrays_of(header)}
        self._segments = lru_cache(maxsize=8)(self._read_segments)

    @classmethod
    def open(
        cls,
        path: str | Path | StoreUrl,
        *,
        verify: Verify = "first",
        threads: int | None = None,
        cache: str | Path | None = None,
        cache_bytes: int | None = None,
        roles: Sequence[str] | None = None,
    ) -> Self:
        """Open a store. `verify` says when a chunk's checksum is checked: at its first read, always, or never.

        `cache` and `cache_bytes` are the folder for copies of a remote store's shards and its bound; by default those
        of the environment (docs/object-stores.md). `roles` limits the rows that may be used, and so the masks, the
        training rows and the moments, to rows of these roles, such as `["assistant"]` (docs/FORMAT.md).

        Raises:
            MissingFileError: nothing is there.
            StoreError: what is there is no store, or its manifest or metadata is damaged.
            UnreachableError: an object store does not answer.
        """
        if verify not in Verify.__args__:
            raise ConfigError(f"expected verify to be one of {', '.join(Verify.__args__)}; got '{verify}'")
        files = open_files(locate(path), cache, cache_bytes)
        manifest = files.manifest()
        if manifest is None:
            raise StoreError(
                f"the store '{files.location}' is empty: its writing was cut off at the start; write it again"
            )
        if manifest.completion is not None:
            for key in manifest.completion.files:
                if key.endswith("zarr.json"):
                    files.read_checked(key, manifest.completion.files)
        store = cls(files, manifest, verify, threads)
        store._reopen = (str(path), verify, threads, cache, cache_bytes, roles)
        if roles is not None:
            store._limit(roles)
        return store

    def _limit(self, roles: Sequence[str]) -> None:
        self._used_codes = role_codes(roles)
        if not self.has_roles:
            raise StoreError(
                f"the store '{self.path}' keeps no roles, got roles = {list(roles)}; leave roles out, or harvest chat "
                'text (a column of messages, or special_tokens = "tokens")'
            )
        self.used_roles = tuple(ROLE_NAMES[code] for code in self._used_codes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path: another process maps the files itself."""
        return _reopen, self._reopen

    def __repr__(self) -> str:
        """Tell the path, the size and the hook points."""
        hooks = ", ".join(f"{name} [{self.d_in(name)}]" for name in self.hook_points)
        return f"ActivationStore('{self.path}', {self.n_rows} rows, {hooks})"

    def d_in(self, hook_point: str) -> int:
        """Return a hook point's width; raise `HookPointError` if the store does not hold it."""
        try:
            return self.manifest.header.hook_points[hook_point]
        except KeyError:
            raise HookPointError(
                f"the store '{self.path}' has no hook point '{hook_point}'; it has {', '.join(self.hook_points)}"
            ) from None

    def read(self, hook_point: str, start: int, stop: int) -> Float[Tensor, "n d_in"]:
        """Return rows [start, stop) in the store's dtype."""
        self._check_rows(start, stop)
        first = start // self.chunk_rows
        chunks = range(first, -(-stop // self.chunk_rows))
        rows = self.read_chunks(hook_point, chunks)
        return rows[start - first * self.chunk_rows : stop - first * self.chunk_rows]

    def read_chunks(
        self, hook_point: str, chunk_indices: Sequence[int] | Int[np.ndarray, " n"], out: Tensor | None = None
    ) -> Float[Tensor, "rows d_in"]:
        """Decode whole chunks, in any order, in parallel, one after another into `out` (made if not given).

        `out` has `len(chunk_indices) * chunk_rows` rows; rows of the store's last chunk beyond `n_rows` are zero.
        """
        d_in = self.d_in(hook_point)
        indices = np.asarray(chunk_indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.n_chunks:
            raise ConfigError(f"expected chunks of 0 to {self.n_chunks - 1}, got {indices.min()} to {indices.max()}")
        # Mapping checks that the files are as large as the manifest says, before memory is taken for them.
        for name in (hook_point, scales_name(hook_point)) if self.codec == "int8" else (hook_point,):
            self._caches[name].prepare(indices)
        shape = (len(indices) * self.chunk_rows, d_in)
        if out is None:
            out = torch.empty(shape, dtype=self.dtype)
        elif not _fits(out, shape, self.dtype):
            raise ConfigError(
                f"expected a contiguous {self.dtype} CPU tensor of shape {shape} to decode into, "
                f"got {out.dtype} on {out.device} of shape {tuple(out.shape)}"
            )
        if self.codec == "int8":
            self._dequantise_chunks(hook_point, indices, out)
        elif len(indices):
            target = out.view(torch.uint8).numpy().reshape(len(indices), -1)
            cache = self._caches[hook_point]
            self._parallel(lambda i: cache.decode(int(indices[i]), target[i], self._verify), len(indices))
        return out

    def place_rows(
        self,
        hook_point: str,
        chunk_indices: Sequence[int] | Int[np.ndarray, " n"],
        destinations: Int64[np.ndarray, " rows"],
        out: Float[Tensor, "n d_in"],
    ) -> None:
        """Decode whole chunks, in parallel, and write row `i` to `out[destinations[i]]`.

        `destinations` has `chunk_rows` numbers per chunk, all different except for -1, which drops a row. Dropped rows
        are written to the last row of `out`, so that row's content is undefined if there are any.
        """
        d_in = self.d_in(hook_point)
        indices = np.asarray(chunk_indices, dtype=np.int64)
        n = len(indices) * self.chunk_rows
        least, most = (int(destinations.min()), int(destinations.max())) if destinations.size else (-1, -1)
        if destinations.shape != (n,) or not -1 <= least <= most < len(out):
            raise ConfigError(
                f"destinations must hold {n} numbers from -1 to {len(out) - 1}; "
                f"got {destinations.size} numbers from {least} to {most}"
            )
        if not _fits(out, (len(out), d_in), self.dtype):
            raise ConfigError(f"expected a contiguous {self.dtype} CPU tensor of width {d_in} to put rows into")
        for name in (hook_point, scales_name(hook_point)) if self.codec == "int8" else (hook_point,):
            self._caches[name].prepare(indices)
        row_bytes = d_in * self.dtype.itemsize
        piece = np.dtype((np.void, piece_bytes(row_bytes)))
        pieces = np.arange(row_bytes // piece.itemsize)
        target = out.view(torch.uint8).numpy().reshape(-1).view(piece)
        scratch = threading.local()

        def place(i: int) -> None:
            if not hasattr(scratch, "rows"):
                scratch.rows = torch.empty(self.chunk_rows, d_in, dtype=self.dtype)
            rows = scratch.rows.view(torch.uint8).numpy().reshape(-1)
            if self.codec == "int8":
                self._dequantise_chunk(hook_point, int(indices[i]), scratch.rows)
            else:
                rows = self._caches[hook_point].view(int(indices[i]), rows, self._verify)
            wanted = destinations[i * self.chunk_rows : (i + 1) * self.chunk_rows]
            if len(pieces) > 1:
                wanted = (wanted[:, None] * len(pieces) + pieces).reshape(-1)
            target[wanted] = rows.view(piece)

        if len(indices):
            self._parallel(place, len(indices))

    def read_quantised(
        self,
        hook_point: str,
        chunk_indices: Sequence[int] | Int[np.ndarray, " n"],
        values: Int8[Tensor, "rows d_in"],
        scales: Float32[Tensor, " rows"],
    ) -> None:
        """Decode whole chunks of an int8 store as they are stored: a row is its scale times its values."""
        assert self.codec == "int8"
        indices = np.asarray(chunk_indices, dtype=np.int64)
        values_of, scales_of = self._caches[hook_point], self._caches[scales_name(hook_point)]
        values_of.prepare(indices)
        scales_of.prepare(indices)
        values_out = values.view(torch.uint8).numpy().reshape(len(indices), -1)
        scales_out = scales.view(torch.uint8).numpy().reshape(len(indices), -1)

        def decode(i: int) -> None:
            values_of.decode(int(indices[i]), values_out[i], self._verify)
            scales_of.decode(int(indices[i]), scales_out[i], self._verify)

        if len(indices):
            self._parallel(decode, len(indices))

    def _dequantise_chunks(self, hook_point: str, indices: np.ndarray, out: Tensor) -> None:
        rows = self.chunk_rows
        self._parallel(
            lambda i: self._dequantise_chunk(hook_point, int(indices[i]), out[i * rows : (i + 1) * rows]), len(indices)
        )

    def _dequantise_chunk(self, hook_point: str, chunk: int, out: Tensor) -> None:
        values = np.empty(out.shape, dtype=np.int8)
        scales = np.empty(len(out), dtype=np.float32)
        self._caches[hook_point].decode(chunk, values.reshape(-1).view(np.uint8), self._verify)
        self._caches[scales_name(hook_point)].decode(chunk, scales.view(np.uint8), self._verify)
        out.copy_(torch.from_numpy(dequantise(values, scales)))

    def _parallel(self, work: Callable[[int], None], n: int) -> None:
        """Run work(0) to work(n - 1) in this process's threads."""
        pool = self._pools.get(os.getpid())
        if pool is None:
            pool = self._pools.setdefault(os.getpid(), ThreadPoolExecutor(self._threads, "store-decode"))
        parts = min(n, self._threads)
        futures = [pool.submit(_run, work, n * i // parts, n * (i + 1) // parts) for i in range(parts)]
        for future in futures:
            future.result()

    def tokens(self, start: int, stop: int) -> Int32[Tensor, " n"] | None:
        """Return the tokens of rows [start, stop), or None if the store holds none."""
        return self._integers(TOKENS, start, stop) if self.has_tokens else None

    def roles(self, start: int, stop: int) -> Int8[Tensor, " n"] | None:
        """Return the codes of `ROLE_NAMES` of rows [start, stop), or None if the store keeps no roles."""
        return self._integers(ROLES, start, stop) if self.has_roles else None

    def _integers(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the tokens or the roles."""
        self._check_rows(start, stop)
        cache = self._caches[name]
        rows = cache.array.chunk_rows
        first, last = start // rows, -(-stop // rows)
        cache.prepare(np.arange(first, last))
        out = np.empty((last - first, rows), dtype=np.dtype(cache.array.dtype).newbyteorder("<"))
        self._parallel(lambda i: cache.decode(first + i, out[i].view(np.uint8), self._verify), last - first)
        return torch.from_numpy(out.reshape(-1)[start - first * rows : stop - first * rows])

    def held_out_contexts(self) -> Bool[np.ndarray, " n_contexts"]:
        """Tell of each context whether it is held out."""
        return self._statistics.held_out

    def row_mask(self, start: int, stop: int, *, any_role: bool = False) -> Bool[np.ndarray, " n"]:
        """Tell of rows [start, stop) which may be used.

        Their token is none of `mask_token_ids`; in a store with roles, packing did not place them; and they are of one
        of the roles that the store was opened with, if it was and not `any_role`.
        """
        self._check_rows(start, stop)
        mask = np.ones(stop - start, dtype=bool)
        tokens = self.tokens(start, stop) if self.mask_token_ids else None
        if tokens is not None:
            mask &= ~np.isin(tokens.numpy(), self.mask_token_ids)
        roles = self.roles(start, stop)
        if roles is not None:
            codes = () if any_role else self._used_codes
            mask &= np.isin(roles.numpy(), codes) if codes else roles.numpy() != PLACED
        return mask

    def training_mask(self, start: int, stop: int) -> Bool[np.ndarray, " n"]:
        """Tell of rows [start, stop) which may be trained on: usable, and of no held-out context."""
        contexts = np.arange(start, stop) // self.context_size
        return self.row_mask(start, stop) & ~self.held_out_contexts()[contexts]

    def training_rows_per_chunk(self) -> Int64[np.ndarray, " n_chunks"]:
        """Count each chunk's rows that may be trained on."""
        if self._used_codes:
            rows = self._statistics.role_rows
            assert rows is not None
            return rows[:, self._used_codes].sum(axis=1)
        return self._statistics.training_rows

    def training_rows_by_role(self) -> dict[str, int]:
        """Count the rows of each role that are neither held out nor masked; empty where the store keeps no roles."""
        rows = self._statistics.role_rows
        return {} if rows is None else dict(zip(ROLE_NAMES, rows.sum(axis=0).tolist(), strict=True))

    def moments(self, hook_point: str) -> Moments:
        """Return the exact float64 moments of a hook point's training rows."""
        d_in = self.d_in(hook_point)
        if self._used_codes:
            by_role = self._statistics.by_role[hook_point]
            return merge([by_role[code] for code in self._used_codes], d_in)
        return self._statistics.moments[hook_point]

    @cached_property
    def _statistics(self) -> Statistics:
        manifest = self.manifest
        if manifest.completion is None:
            return merge_statistics(shard_statistics(self.files, manifest), manifest.header)
        return load_statistics(self.files, STATISTICS, manifest.completion.files, manifest.header, self.n_contexts)

    def documents(self, start: int, stop: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return each row's (document, position in it); -1 where it was not given."""
        from ..format.provenance import expand_segments  # here: it is PyArrow's, which training needs not

        self._check_rows(start, stop)
        parts = []
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            first = shard * self.shard_rows
            document, position = expand_segments(self._segments(shard))
            rows = slice(max(start - first, 0), stop - first)
            parts.append((document[rows], position[rows]))
        none = np.zeros(0, dtype=np.int64)
        return (
            np.concatenate([none, *(part[0] for part in parts)]),
            np.concatenate([none, *(part[1] for part in parts)]),
        )

    def document_info(self, document: int) -> tuple[int | None, str | None]:
        """Return a document's (hash, name), None where the writer was not told."""
        for shard in range(len(self.manifest.shards)):
            table = self._segments(shard)
            found = np.flatnonzero(table["document"].fill_null(-1).to_numpy() == document)
            if len(found):
                row = table.slice(int(found[0]), 1).to_pylist()[0]
                return row["document_hash"], row["document_name"]
        raise StoreError(f"the store '{self.path}' has no document {document}")

    def _read_segments(self, shard: int) -> Any:
        from ..format.provenance import decode_segments

        key = provenance_key(shard)
        record = self.manifest.shards[shard]
        try:
            table = decode_segments(self.files.read_checked(key, record.files))
            if table["length"].to_numpy().sum() != record.contexts * self.context_size:
                raise StoreError("its runs do not cover the shard")
        except StoreError as error:
            raise StoreError(f"the store '{self.path}' is damaged: '{key}': {error}") from None
        return table

    def verify(self, progress: Callable[[int], object] | None = None) -> list[str]:
        """Check every byte against its checksum; return one line per fault, none when the store is whole.

        `progress` is called with the bytes checked since its last call.
        """
        from .verify import find_faults  # it imports pyarrow

        return find_faults(self.files, self.manifest, self._threads, progress or (lambda _: None))

    def _check_rows(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_rows:
            raise ConfigError(f"expected rows within 0 to {self.n_rows}, got {start} to {stop}")


def _fits(out: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    return tuple(out.shape) == shape and out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu"


def _run(work: Callable[[int], None], start: int, stop: int) -> None:
    for i in range(start, stop):
        work(i)


def _reopen(
    path: str,
    verify: Verify,
    threads: int | None,
    cache: str | Path | None,
    cache_bytes: int | None,
    roles: Sequence[str] | None,
) -> ActivationStore:
    return ActivationStore.open(path, verify=verify, threads=threads, cache=cache, cache_bytes=cache_bytes, roles=roles)
