"""Write one rank's shards of a store that several processes write together: `RankWriter`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from msgspec.structs import replace

from ...core.errors import RankError
from ...core.location import StoreUrl, locate, staging_folder
from ..format.layout import MANIFEST, PARTIAL_FOLDER, Header
from ..format.manifest import read_manifest
from ..local.durable import close, disk_errors, lock, remove_tree
from ..local.liveness import SHARED_FOLDER, LivenessLock
from ..local.staged_shards import stage_shard
from ..local.store_folder import StoreFolder, WrittenShard, check_same, finish_shard
from .assignment import ShardAssignment
from .sink import ShardSink
from .writer import ActivationStoreWriter

T = TypeVar("T")
SHARDS_AHEAD = 2
"""Shards for each rank that may wait behind those that rank 0 has adopted, where it uploads them."""
POLL_SECONDS = 0.1


class Group(Protocol):
    """The processes that write a store together."""

    rank: int
    n: int

    def lead(self, action: Callable[[], T]) -> T:
        """Return on every rank what the action, run by rank 0 alone, returns; on its failure every rank raises."""
        ...

    def check(self) -> None:
        """Raise `RankError` if another rank failed or is gone."""
        ...


class RankWriter(ActivationStoreWriter):
    """Append the contexts of this rank's assignment, in order; what all ranks write becomes one store.

    Each finished shard is staged, safe on disk, and rank 0 makes staged shards part of the store in their order. The
    store's lock is shared by the group and held until `release`, so that no other writer comes in between. A store in
    an object store is so written in its staging folder, which all ranks share, and rank 0 uploads it.

    Every rank calls the constructor, then `watch` after a barrier, appends what `assignment.parts` names and closes the
    writer; rank 0 at last calls `adopt` until all is there and `complete`.
    """

    def __init__(
        self,
        path: str | Path | StoreUrl,
        hook_points: Mapping[str, int],
        context_size: int,
        *,
        group: Group,
        **settings: Any,
    ) -> None:
        self._group = group
        location = locate(path)
        self._folder = location if isinstance(location, Path) else staging_folder(location, settings.get("cache"))
        self._store: StoreFolder | None = None
        self._locked: list[IO[bytes]] = []
        self.liveness: LivenessLock | None = None
        try:
            super().__init__(path, hook_points, context_size, **settings)
        except BaseException:
            self.release()
            raise
        self._n_contexts = self.assignment.first_context(0)

    def _open_sink(self, proposed: Header, resume: bool, any_level: bool) -> ShardSink:
        proposed = replace(proposed, has_tokens=True)
        n_committed, staged = self._group.lead(lambda: self._begin(proposed, resume, any_level))
        if self._group.rank:
            self._join(proposed, any_level)
        with disk_errors(self._folder):
            self.liveness = LivenessLock(self._folder / PARTIAL_FOLDER, self._group.rank)
        header = self._read_header()
        self._assignment = ShardAssignment(
            header.contexts_per_shard, n_committed, staged, self._group.rank, self._group.n
        )
        return _RankFolder(self._folder, header, self._group, n_committed, self._store, isinstance(self.path, Path))

    @property
    def assignment(self) -> ShardAssignment:
        """Which contexts this rank's writer is to be given."""
        return self._assignment

    def _begin(self, proposed: Header, resume: bool, any_level: bool) -> tuple[int, dict[int, int]]:
        """Open the store, as rank 0; return the committed contexts and those of each staged shard."""
        if isinstance(self.path, Path):
            store = StoreFolder.open(
                self.path, proposed, resume, any_level, keep_staged=True, keep_contexts=self._keep_contexts
            )
        else:
            from ..remote.remote_folder import open_remote

            store = open_remote(
                self.path,
                proposed,
                resume,
                any_level,
                self._cache,
                keep_staged=True,
                keep_contexts=self._keep_contexts,
            )
        self._store = store
        if store.header is None:
            store.start(proposed)
        store.admit_ranks()
        return store.n_contexts, {number: shard.record.contexts for number, shard in store.staged.items()}

    def _join(self, proposed: Header, any_level: bool) -> None:
        """Share the locks that rank 0 has, and check that this rank would write the same store."""
        try:
            self._locked.append((self._folder / MANIFEST).open("rb"))
        except FileNotFoundError:
            raise RankError(
                f"rank {self._group.rank} does not see the store '{self._folder}' that rank 0 began; {SHARED_FOLDER}"
            ) from None
        lock(self._locked[0], self.path, shared=True)
        if isinstance(self.path, StoreUrl):
            from ..remote.remote_folder import lock_staging

            self._locked.append(lock_staging(self.path, self._folder, shared=True))
        manifest = read_manifest(self._folder)
        assert manifest is not None
        check_same(manifest, proposed, self.path, True, {"codec_level"} if any_level else set())

    def _read_header(self) -> Header:
        manifest = read_manifest(self._folder)
        assert manifest is not None
        return manifest.header

    def _finish_shard(self) -> None:
        super()._finish_shard()
        self._n_contexts = self.assignment.first_context(self._n_contexts)

    @property
    def faults(self) -> list[str]:
        """What earlier ranks had staged and was not usable; known to rank 0."""
        return self._store.faults if self._store else []

    def watch(self) -> None:
        """Begin to watch the other ranks (rank 0: all, the others: rank 0); every rank has its writer by now."""
        assert self.liveness is not None
        self.liveness.watch(range(1, self._group.n) if self._group.rank == 0 else [0])

    def adopt(self) -> int:
        """Make what is staged part of the store as far as it has no gap; return the contexts in it. For rank 0."""
        assert self._store is not None
        with disk_errors(self._folder):
            self._store.adopt()
        return self._store.n_contexts

    def complete(self) -> None:
        """Complete the store, every context of which is committed. For rank 0."""
        assert self._store is not None
        self._store.complete()

    def release(self) -> None:
        """Let go of the store's lock, and show this rank as ended."""
        if self.liveness is not None:
            self.liveness.close()
        for file in self._locked:
            close(file)
        if self._store is not None:
            self._store.close()


class _RankFolder:
    """What the writer commits to: shards go to the staging folder, and rank 0 adopts what can follow.

    Unless `path` is the store's own folder, a shard far beyond those that are adopted holds its rank up: rank 0 adopts
    no faster than it uploads, and what waits takes room on the disk. The rank that makes the next shard never waits.
    """

    def __init__(
        self, path: Path, header: Header, group: Group, n_committed: int, store: StoreFolder | None, is_own: bool
    ) -> None:
        self.partial = path / PARTIAL_FOLDER / f"rank-{group.rank}"
        self.header = header
        self.n_contexts = n_committed
        self.may_append = True
        self._path = path
        self._group = group
        self._store = store
        self._is_own = is_own

    def start(self, header: Header) -> Header:
        return header  # rank 0 has begun the store

    def commit(self, shard: WrittenShard) -> None:
        written, record = finish_shard(self.header, shard, self.partial)
        stage_shard(self._path, self.header, written, record, self.partial)
        while True:
            if self._store is not None:
                self._store.adopt()
            if self._is_own or record.shard < self._n_adopted() + SHARDS_AHEAD * self._group.n:
                return
            self._group.check()
            time.sleep(POLL_SECONDS)

    def _n_adopted(self) -> int:
        return (self._path / MANIFEST).read_bytes().count(b"\n") - 1  # the first line is the header

    def complete(self) -> None:
        """Do nothing: that is for rank 0, when every rank is done."""

    def clear_partial(self) -> None:
        remove_tree(self.partial)

    def close(self) -> None:
        """Do nothing: the group holds the store until all ranks are done."""
