"""Read a store: `ActivationStore`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int8, Int32, Int64
from torch import Tensor

from ...core.errors import ConfigError, HookPointError, StoreError
from ...core.location import StoreUrl, locate
from ...display.html import facts_html
from ..format.bits import TORCH_DTYPES
from ..format.layout import ROLES, STATISTICS, TOKENS
from ..format.manifest import Manifest
from ..format.moments import Moments, merge_moments
from ..format.roles import PLACED, ROLE_NAMES, role_codes
from ..format.statistics import Statistics, merge_statistics
from ..local.store_files import StoreFiles, load_statistics, shard_statistics
from .chunks import ChunkReader, Verify
from .documents import DocumentReader
from .open import open_files


class ActivationStore:
    """A store of activations, opened for reading; safe to use from several threads.

    Open it with `ActivationStore.open(path)`, where the path is a folder or a URL such as `s3://bucket/prefix`. Row `r`
    is position `r % context_size` of context `r // context_size`. Of an unfinished store the committed shards can be
    read.

    Attributes:
        path: folder or URL of the store.
        hook_points: names of the hook points; `d_in(name)` is the width of one.
        n_rows: number of rows, one per token, held-out and masked ones included.
        n_contexts: number of contexts.
        context_size: rows per context.
        dtype: data type of what `read` returns.
        codec: how chunks are compressed: none, lz4, zstd or int8.
        complete: whether its writer has finished.
        metadata: what the writer recorded, such as `model` and `dataset`.
        mask_token_ids: tokens whose rows are neither trained on nor evaluated.
        has_tokens: whether the store has tokens.
        has_roles: whether the store has a role for each row.
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
        self._threads = threads or max(min(os.cpu_count() or 1, 16), files.threads)
        self._chunks = ChunkReader(files, manifest, verify, self._threads)
        self._documents = DocumentReader(files, manifest)

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

        `cache` and `cache_bytes` are the folder for copies of a remote store's shards and its size limit; their
        defaults come from the environment (docs/object-stores.md). `roles`, such as `["assistant"]`, limits masks,
        training rows and moments to rows of these roles (docs/FORMAT.md).

        Raises:
            MissingFileError: the path or URL does not exist.
            StoreError: it is not a store, or its manifest or metadata is damaged.
            UnreachableError: an object store does not answer.
        """
        if verify not in Verify.__args__:
            raise ConfigError(f"expected verify to be one of {', '.join(Verify.__args__)}; got '{verify}'")
        files = open_files(locate(path), cache, cache_bytes)
        manifest = files.manifest()
        if manifest is None:
            raise StoreError(
                f"the store '{files.location}' is empty: its writer was interrupted at the start; write it again"
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
                f"the store '{self.path}' has no roles, got roles = {list(roles)}; leave roles out, or harvest chat "
                'text (a column of messages, or special_tokens = "tokens")'
            )
        self.used_roles = tuple(ROLE_NAMES[code] for code in self._used_codes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path: another process opens the store itself."""
        return _reopen, self._reopen

    def __repr__(self) -> str:
        """Return the path, the number of rows and the hook points."""
        hooks = ", ".join(f"{name} [{self.d_in(name)}]" for name in self.hook_points)
        return f"ActivationStore('{self.path}', {self.n_rows} rows, {hooks})"

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        hooks = {name: f"width {self.d_in(name)}" for name in self.hook_points}
        facts = {
            "rows": f"{self.n_rows:,} in {self.n_contexts:,} contexts of {self.context_size} tokens",
            "held out": f"{int(self.held_out_contexts().sum()):,} contexts",
            "values": f"{str(self.dtype).removeprefix('torch.')}, {self.codec}",
            "model": self.metadata.get("model"),
            "text": self.metadata.get("dataset"),
            "state": None if self.complete else "unfinished: run its harvest again to resume it",
        }
        return facts_html(f"ActivationStore {self.path}", hooks | facts)

    def d_in(self, hook_point: str) -> int:
        """Return a hook point's width; raise `HookPointError` if the store does not hold it."""
        try:
            return self.manifest.header.hook_points[hook_point]
        except KeyError:
            raise HookPointError(
                f"the store '{self.path}' has no hook point '{hook_point}'; it has {', '.join(self.hook_points)}"
            ) from None

    def read(self, hook_point: str, start: int, stop: int) -> Float[Tensor, "n d_in"]:
        """Return rows [start, stop) in the store's dtype, in raw units: as the model computed them.

        Raises:
            HookPointError: the store does not hold the hook point.
            ConfigError: the rows are not all in the store.
            StoreError: a chunk does not match its checksum.
        """
        self._check_rows(start, stop)
        first = start // self.chunk_rows
        chunks = range(first, -(-stop // self.chunk_rows))
        rows = self.read_chunks(hook_point, chunks)
        return rows[start - first * self.chunk_rows : stop - first * self.chunk_rows]

    def read_chunks(
        self, hook_point: str, chunk_indices: Sequence[int] | Int[np.ndarray, " n"], out: Tensor | None = None
    ) -> Float[Tensor, "rows d_in"]:
        """Decode whole chunks, in any order and in parallel, one after another into `out`.

        `out` has `len(chunk_indices) * chunk_rows` rows and is allocated if not given; rows of the store's last chunk
        beyond `n_rows` are zero.
        """
        indices = np.asarray(chunk_indices, dtype=np.int64)
        d_in = self.d_in(hook_point)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.n_chunks:
            raise ConfigError(f"expected chunks of 0 to {self.n_chunks - 1}, got {indices.min()} to {indices.max()}")
        return self._chunks.decode(hook_point, indices, out, d_in)

    def place_rows(
        self,
        hook_point: str,
        chunk_indices: Sequence[int] | Int[np.ndarray, " n"],
        destinations: Int64[np.ndarray, " rows"],
        out: Float[Tensor, "n_out d_in"],
    ) -> None:
        """Decode whole chunks, in parallel, and write row `i` to `out[destinations[i]]`.

        `destinations` has `chunk_rows` numbers per chunk, all different except for -1, which drops a row. Dropped rows
        are written to the last row of `out`, so that row's content is undefined if there are any.
        """
        d_in = self.d_in(hook_point)
        self._chunks.place_rows(hook_point, np.asarray(chunk_indices, dtype=np.int64), destinations, out, d_in)

    def read_quantised(
        self,
        hook_point: str,
        chunk_indices: Sequence[int] | Int[np.ndarray, " n"],
        values: Int8[Tensor, "rows d_in"],
        scales: Float32[Tensor, " rows"],
    ) -> None:
        """Decode whole chunks of an int8 store without dequantising: a row is its scale times its values."""
        assert self.codec == "int8"
        self._chunks.read_quantised(hook_point, np.asarray(chunk_indices, dtype=np.int64), values, scales)

    def tokens(self, start: int, stop: int) -> Int32[Tensor, " n"] | None:
        """Return the tokens of rows [start, stop), or None if the store has none."""
        return self._integers(TOKENS, start, stop) if self.has_tokens else None

    def roles(self, start: int, stop: int) -> Int8[Tensor, " n"] | None:
        """Return the codes of `ROLE_NAMES` of rows [start, stop), or None if the store has none."""
        return self._integers(ROLES, start, stop) if self.has_roles else None

    def _integers(self, name: str, start: int, stop: int) -> Tensor:
        self._check_rows(start, stop)
        return self._chunks.integers(name, start, stop)

    def held_out_contexts(self) -> Bool[np.ndarray, " contexts"]:
        """Return which contexts are held out."""
        return self._statistics.held_out

    def row_mask(self, start: int, stop: int, *, any_role: bool = False) -> Bool[np.ndarray, " n"]:
        """Return which of the rows [start, stop) are not masked.

        A row is masked if its token is in `mask_token_ids`, if its role is `placed`, or, unless `any_role`, if the
        store was opened with `roles` and the row has another one.
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
        """Return which of the rows [start, stop) are training rows: not masked, and not of a held-out context."""
        contexts = np.arange(start, stop) // self.context_size
        return self.row_mask(start, stop) & ~self.held_out_contexts()[contexts]

    def training_rows_per_chunk(self) -> Int64[np.ndarray, " chunks"]:
        """Return the number of training rows in each chunk."""
        if self._used_codes:
            rows = self._statistics.role_rows
            assert rows is not None
            return rows[:, self._used_codes].sum(axis=1)
        return self._statistics.training_rows

    def training_rows_by_role(self) -> dict[str, int]:
        """Return the number of training rows of each role, whatever roles the store was opened with.

        The result is empty if the store has no roles.
        """
        rows = self._statistics.role_rows
        return {} if rows is None else dict(zip(ROLE_NAMES, rows.sum(axis=0).tolist(), strict=True))

    def moments(self, hook_point: str) -> Moments:
        """Return the exact float64 moments of a hook point's training rows."""
        d_in = self.d_in(hook_point)
        if self._used_codes:
            by_role = self._statistics.by_role[hook_point]
            return merge_moments([by_role[code] for code in self._used_codes], d_in)
        return self._statistics.moments[hook_point]

    @cached_property
    def _statistics(self) -> Statistics:
        manifest = self.manifest
        if manifest.completion is None:
            return merge_statistics(shard_statistics(self.files, manifest), manifest.header)
        return load_statistics(self.files, STATISTICS, manifest.completion.files, manifest.header, self.n_contexts)

    def documents(self, start: int, stop: int) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return (document, position in it) of each row in [start, stop); -1 where unknown."""
        self._check_rows(start, stop)
        return self._documents.rows(start, stop)

    def document_keys(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Return the document of each row in [start, stop); a negative number per context where it is unknown."""
        document, _ = self.documents(start, stop)
        return np.where(document < 0, -1 - np.arange(start, stop) // self.context_size, document)

    def document_info(self, document: int) -> tuple[int | None, str | None]:
        """Return a document's (hash, name), each None where unknown."""
        return self._documents.info(document)

    def verify(self, progress: Callable[[int], object] | None = None) -> list[str]:
        """Check every byte against its checksum; return one line per fault.

        `progress` is called with the bytes checked since its last call.
        """
        from .verify import find_faults  # it imports pyarrow

        return find_faults(self.files, self.manifest, self._threads, progress or (lambda _: None))

    def _check_rows(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_rows:
            raise ConfigError(f"expected rows within 0 to {self.n_rows}, got {start} to {stop}")


def _reopen(
    path: str,
    verify: Verify,
    threads: int | None,
    cache: str | Path | None,
    cache_bytes: int | None,
    roles: Sequence[str] | None,
) -> ActivationStore:
    return ActivationStore.open(path, verify=verify, threads=threads, cache=cache, cache_bytes=cache_bytes, roles=roles)
