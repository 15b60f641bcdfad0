"""Copies of remote shards in a local folder of bounded size, which several processes share.

A copy is written under a temporary name, checked, and renamed, so a file under its own name is whole. Each copy has
a lock file (`flock`), so that it is fetched once, and the folder has one, under which room is made: the copies used
longest ago go first, by their modification time, which every use sets anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...core.errors import DiskSpaceError, StoreError, ThresherError

COPIES, PARTS, LOCKS = "shards", "partial", "locks"


class CacheFolder:
    """At most `limit` bytes of copies in `folder`, temporary files included."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, owner: str, key: str) -> Path:
        """Return where the copy of a file of one store is, if it is there."""
        return self.folder / COPIES / _flat(owner, key)

    def touch(self, path: Path) -> None:
        """Mark a copy as just used."""
        with suppress(FileNotFoundError):
            os.utime(path)

    def fetch(
        self, owner: str, key: str, n_bytes: int, is_good: Callable[[Path], bool], write: Callable[[Path], None]
    ) -> Path | None:
        """Return a copy that `is_good`, made by `write` if need be; None if there is no room even without the others.

        `write` fills a file of `n_bytes` and raises what is wrong with it.
        """
        target = self.path(owner, key)
        with self._disk_errors(), self._locked(target.name):
            if target.is_file():
                if is_good(target):
                    self.touch(target)
                    return target
                target.unlink(missing_ok=True)
            part = self.folder / PARTS / target.name
            if not self._reserve(part, n_bytes):
                return None
            try:
                write(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return target

    def trim(self) -> None:
        """Remove what is beyond the bound, which may be lower than it was."""
        if self.folder.is_dir():
            with self._disk_errors(), self._locked("folder"):
                self._make_room(0)

    def _reserve(self, part: Path, n_bytes: int) -> bool:
        """Make room for a file and take it by a file of that length with nothing in it; say whether there is any."""
        with self._locked("folder"):
            part.unlink(missing_ok=True)
            if not self._make_room(n_bytes):
                return False
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.truncate(n_bytes)
        return True

    def _make_room(self, n_bytes: int) -> bool:
        """Remove what was used longest ago until so many bytes more are within the bound; say whether they can be."""
        entries = sorted(self._entries(), key=lambda entry: entry[0])
        excess = sum(size for _, size, _ in entries) + n_bytes - self.limit
        evictable = [entry for entry in entries if entry[2].parent.name == COPIES or not self._in_use(entry[2])]
        if excess > sum(size for _, size, _ in evictable):
            return False
        for _, size, path in evictable:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        return True

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Yield (time of last use, bytes, path) of every copy and temporary file."""
        for folder in (self.folder / COPIES, self.folder / PARTS):
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path

    def _in_use(self, part: Path) -> bool:
        """Tell whether a temporary file is being written: its writer holds its lock."""
        try:
            with self._locked(part.name, wait=False):
                return False
        except BlockingIOError:
            return True

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, ThresherError):
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskSpaceError(
                    f"the disk of the cache '{self.folder}' is full; make room, or allow the cache less "
                    f"than its {self.limit} bytes (cache_bytes, THRESHER_CACHE_BYTES)"
                ) from error
            raise StoreError(f"cannot write the cache '{self.folder}': {error.strerror or error}") from error

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[None]:
        folder = self.folder / LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
        finally:
            os.close(handle)


def _flat(owner: str, key: str) -> str:
    """Return one file name for a store's file; keys hold no `~`."""
    return f"{owner}~{key.replace('/', '~')}"
