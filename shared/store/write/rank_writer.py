"""Write one rank's shards of a store that several ranks write together: `RankWriter`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.location import StoreUrl
from ..format.layout import Header
from ..local.liveness import LivenessLock
from .assignment import ShardAssignment
from .rank_store import RankStore, WriterGroup
from .sink import ShardSink
from .writer import ActivationStoreWriter


class RankWriter(ActivationStoreWriter):
    """Append the contexts assigned to this rank, in order; together the ranks write one store.

    Each finished shard is staged, flushed to disk, and rank 0 commits staged shards in order. A store in an object
    store is written in its staging folder, which all ranks share; rank 0 uploads it.

    Every rank calls the constructor, then `watch` after a barrier, appends the contexts of `assignment.parts` and
    closes the writer. Finally rank 0 calls `adopt` until all contexts are committed, and then `complete`. Every rank
    ends with `release`; until then no other writer can open the store.
    """

    def __init__(
        self,
        path: str | Path | StoreUrl,
        hook_points: Mapping[str, int],
        context_size: int,
        *,
        group: WriterGroup,
        **settings: Any,
    ) -> None:
        self._group = group
        super().__init__(path, hook_points, context_size, **settings)

    def _open(
        self, proposed: Header, resume: bool, any_level: bool, cache: str | Path | None, keep_contexts: int | None
    ) -> tuple[ShardSink, ShardAssignment]:
        self._store = RankStore(self.path, proposed, self._group, resume, any_level, cache, keep_contexts)
        return self._store.sink(), self._store.assignment

    @property
    def liveness(self) -> LivenessLock:
        """The lock that shows the other ranks that this one lives, and its watch over them."""
        return self._store.liveness

    @property
    def faults(self) -> list[str]:
        """One line per staged shard that was damaged and dropped; empty except on rank 0."""
        return self._store.faults

    def watch(self) -> None:
        """Start to watch the other ranks (rank 0) or rank 0 (the others), once every rank has its writer."""
        self._store.watch()

    def adopt(self) -> int:
        """Commit staged shards, on rank 0, up to the first that is missing; return the number of committed contexts."""
        return self._store.adopt()

    def complete(self) -> None:
        """Complete the store, on rank 0, when every context is committed."""
        self._store.complete()

    def release(self) -> None:
        """Release the store's locks, and so show this rank as exited."""
        self._store.release()
