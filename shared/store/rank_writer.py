"""Write one rank's shards of a store that several processes write together: `RankWriter`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from msgspec.structs import replace

from ..errors import ConfigError, RankError
from .commit import StoreFolder, check_same, finish_shard
from .durable import close, disk_errors, lock, remove_tree
from .format import MANIFEST, PARTIAL_FOLDER, Header
from .location import locate
from .manifest import read_manifest
from .presence import Presence
from .share import Share
from .sink import ShardSink, WrittenShard
from .staging import stage_shard
from .writer import ActivationStoreWriter

T = TypeVar("T")


class Group(Protocol):
    """The processes that write a store together."""

    rank: int
    world: int

    def lead(self, action: Callable[[], T]) -> T:
        """Return on every rank what the action, run by rank 0 alone, returns; on its failure every rank raises."""
        ...


class RankWriter(ActivationStoreWriter):
    """Append the contexts of this rank's share, in order; what all ranks write becomes one store.

    Each finished shard is staged, safe on disk, and rank 0 makes staged shards part of the store in their order. The
    store's lock is shared by the group and held until `release`, so that no other writer comes in between.

    Every rank calls the constructor, then `watch` after a barrier, appends what `share.parts` names, closes the writer,
    and rank 0 at last calls `adopt` until all is there and `complete`.
    """

    def __init__(
        self, path: str | Path, hook_points: Mapping[str, int], context_size: int, *, group: Group, **settings: Any
    ) -> None:
        self._group = group
        self._place = shared_folder(path)
        self._store: StoreFolder | None = None
        self._manifest_file: IO[bytes] | None = None
        self.presence: Presence | None = None
        try:
            super().__init__(path, hook_points, context_size, **settings)
        except BaseException:
            self.release()
            raise
        self._n_contexts = self.share.first_context(0)

    def _open_folder(self, proposed: Header, resume: bool, any_level: bool) -> ShardSink:
        proposed = replace(proposed, has_tokens=True)
        n_committed, staged = self._group.lead(lambda: self._begin(proposed, resume, any_level))
        if self._group.rank:
            self._join(proposed, any_level)
        with disk_errors(self._place):
            self.presence = Presence(self._place / PARTIAL_FOLDER, self._group.rank)
        header = self._read_header()
        self._share = Share(header.contexts_per_shard, n_committed, staged, self._group.rank, self._group.world)
        return _RankFolder(self._place, header, self._group.rank, n_committed, self._store)

    @property
    def share(self) -> Share:
        """Which contexts this rank's writer is to be given."""
        return self._share

    def _begin(self, proposed: Header, resume: bool, any_level: bool) -> tuple[int, dict[int, int]]:
        """Open the store, as rank 0; return the committed contexts and those of each staged shard."""
        store = self._store = StoreFolder.open(self._place, proposed, resume, any_level, keep_staged=True)
        if store.header is None:
            store.start(proposed)
        store.admit_ranks()
        return store.n_contexts, {number: shard.record.contexts for number, shard in store.staged.items()}

    def _join(self, proposed: Header, any_level: bool) -> None:
        """Share the lock that rank 0 has, and check that this rank would write the same store."""
        try:
            self._manifest_file = (self._place / MANIFEST).open("rb")
        except FileNotFoundError:
            raise RankError(
                f"rank {self._group.rank} does not see the store '{self._place}' that rank 0 has begun; "
                "name a store on a file system that all machines share"
            ) from None
        lock(self._manifest_file, self._place, shared=True)
        manifest = read_manifest(self._place)
        assert manifest is not None
        check_same(manifest, proposed, self._place, True, {"codec_level"} if any_level else set())

    def _read_header(self) -> Header:
        manifest = read_manifest(self._place)
        assert manifest is not None
        return manifest.header

    def _finish_shard(self) -> None:
        super()._finish_shard()
        self._n_contexts = self.share.first_context(self._n_contexts)

    @property
    def faults(self) -> list[str]:
        """What earlier ranks had staged and was not usable; known to rank 0."""
        return self._store.faults if self._store else []

    def watch(self) -> None:
        """Begin to watch the other ranks (rank 0: all, the others: rank 0); every rank has its writer by now."""
        assert self.presence is not None
        self.presence.watch(range(1, self._group.world) if self._group.rank == 0 else [0])

    def adopt(self) -> int:
        """Make what is staged part of the store as far as it has no gap; return the contexts in it. For rank 0."""
        assert self._store is not None
        with disk_errors(self._place):
            self._store.adopt()
        return self._store.n_contexts

    def complete(self) -> None:
        """Complete the store, every context of which is committed. For rank 0."""
        assert self._store is not None
        self._store.complete()

    def release(self) -> None:
        """Let go of the store's lock, and show this rank as ended."""
        if self.presence is not None:
            self.presence.close()
        if self._manifest_file is not None:
            close(self._manifest_file)
        if self._store is not None:
            self._store.close()


def shared_folder(path: str | Path) -> Path:
    """Return the folder that a store is in; raise `ConfigError` where several ranks cannot write."""
    place = locate(path)
    if not isinstance(place, Path):
        raise ConfigError(
            f"several ranks cannot write to '{place}'; harvest into a folder that they share and copy it there, "
            "or harvest with one process"
        )
    return place


class _RankFolder:
    """What the writer commits to: shards go to the staging folder, and rank 0 adopts what can follow."""

    def __init__(self, path: Path, header: Header, rank: int, n_committed: int, store: StoreFolder | None) -> None:
        self.partial = path / PARTIAL_FOLDER / f"rank-{rank}"
        self.header = header
        self.n_contexts = n_committed
        self.may_append = True
        self._path = path
        self._store = store

    def start(self, header: Header) -> Header:
        return header  # rank 0 has begun the store

    def commit(self, shard: WrittenShard) -> None:
        written, record = finish_shard(self.header, shard, self.partial)
        stage_shard(self._path, self.header, written, record, self.partial)
        if self._store is not None:
            self._store.adopt()

    def complete(self) -> None:
        """Do nothing: that is for rank 0, when every rank is done."""

    def clear_partial(self) -> None:
        remove_tree(self.partial)

    def close(self) -> None:
        """Do nothing: the group holds the store until all ranks are done."""
