"""Detect which processes of a group are alive: each holds a lock on its own file, which the kernel releases on exit."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from ...core.errors import RankError
from .durable import close, make_folder

SHARED_FOLDER = "choose a store path (or, for a URL, a `cache` folder) on a file system that all machines share"


class LivenessLock:
    """This process's lock, and the lock files of the ranks that it watches."""

    def __init__(self, folder: Path, rank: int) -> None:
        make_folder(folder)
        self._folder = folder
        self._own = (folder / _name(rank)).open("wb")
        fcntl.flock(self._own.fileno(), fcntl.LOCK_EX)
        self._others: dict[int, IO[bytes]] = {}

    def watch(self, ranks: Iterable[int]) -> None:
        """Start to watch ranks, which must hold their locks already."""
        for rank in ranks:
            try:
                self._others[rank] = (self._folder / _name(rank)).open("rb")
            except FileNotFoundError:
                raise RankError(
                    f"rank {rank} does not write to the same folder as this rank, '{self._folder.parent}'; "
                    f"{SHARED_FOLDER}"
                ) from None

    def gone(self) -> list[int]:
        """Return the watched ranks that have exited."""
        gone = []
        for rank, file in self._others.items():
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            gone.append(rank)
        return gone

    def close(self) -> None:
        """Release the lock."""
        for file in (self._own, *self._others.values()):
            close(file)


def _name(rank: int) -> str:
    return f"rank-{rank}.alive"
