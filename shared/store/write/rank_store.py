"""One rank's hold on a store that several ranks write together: its locks, its assignment and where its shards go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, TypeVar

from msgspec.structs import replace

from ...core.errors import RankError
from ...core.location import StoreUrl, staging_folder
from ..format.layout import MANIFEST, PARTIAL_FOLDER, Header
from ..format.manifest import read_manifest
from ..local.durable import close, disk_errors, lock, remove_tree
from ..local.liveness import SHARED_FOLDER, LivenessLock
from ..local.shard_writer import WrittenShard
from ..local.staged_shards import stage_shard
from ..local.store_folder import StoreFolder, check_same
from .assignment import ShardAssignment

if TYPE_CHECKING:
    from ..remote.remote_folder import RemoteStoreFolder

_T = TypeVar("_T")
SHARDS_AHEAD = 2
"""Shards per rank that may be staged ahead of those that rank 0 has adopted, if it uploads them."""
POLL_SECONDS = 0.1


class WriterGroup(Protocol):
    """The processes that write a store together."""

    rank: int
    n: int

    def lead(self, action: Callable[[], _T]) -> _T:
        """Run the action on rank 0 alone and return its result on every rank; if it fails, every rank raises."""
        ...

    def check(self) -> None:
        """Raise `RankError` if another rank failed or exited."""
        ...


class RankStore:
    """The store, or the staging folder of a remote one, held by one rank of a group until `release`.

    Rank 0 opens the store and alone writes its manifest. The lock is shared by the group, so no other writer can take
    it while any of the ranks lives. `assignment` says which contexts this rank writes.
    """

    def __init__(
        self,
        location: Path | StoreUrl,
        proposed: Header,
        group: WriterGroup,
        resume: bool,
        any_level: bool,
        cache: str | Path | None,
        keep_contexts: int | None,
    ) -> None:
        self._group = group
        self._location = location
        self._folder = location if isinstance(location, Path) else staging_folder(location, cache)
        self._opened: StoreFolder | RemoteStoreFolder | None = None
        self._locked: list[IO[bytes]] = []
        proposed = replace(proposed, has_tokens=True)
        try:
            n_committed, staged = group.lead(lambda: self._open(proposed, resume, any_level, cache, keep_contexts))
            if group.rank:
                self._join(proposed, any_level)
            with disk_errors(self._folder):
                self.liveness = LivenessLock(self._folder / PARTIAL_FOLDER, group.rank)
        except BaseException:
            self._unlock()
            raise
        manifest = read_manifest(self._folder)
        assert manifest is not None
        self._header = manifest.header
        self.assignment = ShardAssignment(self._header.contexts_per_shard, n_committed, staged, group.rank, group.n)

    def sink(self) -> RankSink:
        """Return where this rank's writer commits its shards to."""
        uploads = isinstance(self._location, StoreUrl)
        return RankSink(self._folder, self._header, self._group, self.assignment.n_committed, self._opened, uploads)

    def _open(
        self,
        proposed: Header,
        resume: bool,
        any_level: bool,
        cache: str | Path | None,
        keep_contexts: int | None,
    ) -> tuple[int, dict[int, int]]:
        """Open the store on rank 0; return the number of committed contexts, and the contexts of each staged shard."""
        if isinstance(self._location, Path):
            opened = StoreFolder.open(
                self._location, proposed, resume, any_level, keep_staged=True, keep_contexts=keep_contexts
            )
        else:
            from ..remote.remote_folder import open_remote

            opened = open_remote(
                self._location, proposed, resume, any_level, cache, keep_staged=True, keep_contexts=keep_contexts
            )
        self._opened = opened
        if opened.header is None:
            opened.start(proposed)
        opened.admit_ranks()
        return opened.n_contexts, {number: shard.record.contexts for number, shard in opened.staged.items()}

    def _join(self, proposed: Header, any_level: bool) -> None:
        """Share rank 0's locks, and check that this rank would write the same store."""
        try:
            self._locked.append((self._folder / MANIFEST).open("rb"))
        except FileNotFoundError:
            raise RankError(
                f"rank {self._group.rank} does not see the store '{self._folder}' that rank 0 began; {SHARED_FOLDER}"
            ) from None
        lock(self._locked[0], self._location, shared=True)
        if isinstance(self._location, StoreUrl):
            from ..remote.staging import lock_staging

            self._locked.append(lock_staging(self._location, self._folder, shared=True))
        manifest = read_manifest(self._folder)
        assert manifest is not None
        check_same(manifest, proposed, self._location, True, {"codec_level"} if any_level else set())

    @property
    def faults(self) -> list[str]:
        """One line per staged shard that was damaged and dropped; empty except on rank 0."""
        return self._opened.faults if self._opened else []

    def watch(self) -> None:
        """Start to watch the other ranks (rank 0) or rank 0 (the others), once every rank has its `RankStore`."""
        self.liveness.watch(range(1, self._group.n) if self._group.rank == 0 else [0])

    def adopt(self) -> int:
        """Commit staged shards, on rank 0, up to the first that is missing; return the number of committed contexts."""
        assert self._opened is not None
        with disk_errors(self._folder):
            self._opened.adopt()
        return self._opened.n_contexts

    def complete(self) -> None:
        """Complete the store, on rank 0, when every context is committed."""
        assert self._opened is not None
        self._opened.complete()

    def release(self) -> None:
        """Release the locks, and so show this rank as exited."""
        self.liveness.close()
        self._unlock()

    def _unlock(self) -> None:
        for file in self._locked:
            close(file)
        if self._opened is not None:
            self._opened.close()


class RankSink:
    """Where one rank's shards are committed to: they are staged, and rank 0 adopts all that can follow.

    If rank 0 `uploads`, a rank blocks when its shard is far ahead of the adopted ones, because rank 0 adopts no faster
    than it uploads and staged shards take disk space. The rank that makes the next shard never blocks.
    """

    def __init__(
        self,
        folder: Path,
        header: Header,
        group: WriterGroup,
        n_committed: int,
        opened: StoreFolder | RemoteStoreFolder | None,
        uploads: bool,
    ) -> None:
        self.partial = folder / PARTIAL_FOLDER / f"rank-{group.rank}"
        self.header = header
        self.n_contexts = n_committed
        self.may_append = True
        self._folder = folder
        self._group = group
        self._opened = opened
        self._uploads = uploads

    def start(self, header: Header) -> Header:
        """Do nothing: rank 0 has begun the store."""
        return header

    def commit(self, shard: WrittenShard) -> None:
        """Stage a written shard; on rank 0, adopt what can follow."""
        written, record = shard.finish(self.header, self.partial)
        stage_shard(self._folder, self.header, written, record, self.partial)
        while True:
            if self._opened is not None:
                self._opened.adopt()
            if not self._uploads or record.shard < self._n_adopted() + SHARDS_AHEAD * self._group.n:
                return
            self._group.check()
            time.sleep(POLL_SECONDS)

    def _n_adopted(self) -> int:
        return (self._folder / MANIFEST).read_bytes().count(b"\n") - 1  # the first line is the header

    def complete(self) -> None:
        """Do nothing: rank 0 completes the store when every rank is done."""

    def clear_partial(self) -> None:
        """Remove this rank's temporary files."""
        remove_tree(self.partial)

    def close(self) -> None:
        """Do nothing: the group holds the store until `RankStore.release`."""
