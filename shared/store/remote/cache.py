"""A cache of remote shards: copies in a local folder of bounded size, shared by several processes.

A copy is written under a temporary name, checked and renamed, so a file under its final name is complete; copies are
not flushed, because each is checked again before use. Each copy has a lock file (`flock`), so that it is downloaded
once. The folder has another one, which is held while the least recently used copies are removed; every use of a copy
sets its modification time.
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
    """At most `limit` bytes of copies in `folder`, including temporary files."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, owner: str, key: str) -> Path:
        """Return the path that the copy of a store's file has, whether it exists or not."""
        return self.folder / COPIES / _flat(owner, key)

    def touch(self, path: Path) -> None:
        """Mark a copy as just used."""
        with suppress(FileNotFoundError):
            os.utime(path)

    def fetch(
        self, owner: str, key: str, n_bytes: int, is_good: Callable[[Path], bool], write: Callable[[Path], None]
    ) -> Path | None:
        """Return a copy that `is_good`, downloaded by `write` if needed; None if `limit` leaves no room for it.

        `write` fills a file of `n_bytes`, and raises an error if its content is wrong.
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
        """Remove copies until the cache is within `limit`, which may be lower than in an earlier run."""
        if self.folder.is_dir():
            with self._disk_errors(), self._locked("folder"):
                self._make_room(0)

    def _reserve(self, part: Path, n_bytes: int) -> bool:
        """Make room for a file and reserve it by an empty file of that length; return whether that was possible."""
        with self._locked("folder"):
            part.unlink(missing_ok=True)
            if not self._make_room(n_bytes):
                return False
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.truncate(n_bytes)
        return True

    def _make_room(self, n_bytes: int) -> bool:
        """Remove the least recently used copies until `n_bytes` more fit; return whether they do."""
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
        """Return whether a temporary file is being written: its writer then holds its lock."""
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
                    f"the disk of the cache '{self.folder}' is full; free some space, or set the cache's limit "
                    f"below {self.limit} bytes (cache_bytes, THRESHER_CACHE_BYTES)"
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
