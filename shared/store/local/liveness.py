"""Whether the processes of a group live: each holds a lock on a file of its own until it ends, however it ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from ...core.errors import RankError
from .durable import close, make_folder

SHARED_FOLDER = "put it on a file system that all machines share: so name the store, or the cache of one that has a URL"


class LivenessLock:
    """This process's own lock, and the files of those it watches."""

    def __init__(self, folder: Path, rank: int) -> None:
        make_folder(folder)
        self._folder = folder
        self._own = (folder / _name(rank)).open("wb")
        fcntl.flock(self._own.fileno(), fcntl.LOCK_EX)
        self._others: dict[int, IO[bytes]] = {}

    def watch(self, ranks: Iterable[int]) -> None:
        """Begin to watch ranks, which have their locks by now."""
        for rank in ranks:
            try:
                self._others[rank] = (self._folder / _name(rank)).open("rb")
            except FileNotFoundError:
                raise RankError(
                    f"rank {rank} does not write to the same folder as this rank, '{self._folder.parent}'; "
                    f"{SHARED_FOLDER}"
                ) from None

    def gone(self) -> list[int]:
        """Return the watched ranks that have ended: their locks are free."""
        gone = []
        for rank, file in self._others.items():
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            gone.append(rank)
        return gone

    def close(self) -> None:
        """Let go of the lock."""
        for file in (self._own, *self._others.values()):
            close(file)


def _name(rank: int) -> str:
    return f"rank-{rank}.alive"
