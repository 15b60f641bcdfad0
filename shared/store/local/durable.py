"""Writing to disk in an order that survives a kill or a power failure at any moment.

Files are written under temporary names, flushed, renamed, and only then named in the manifest. Tests set `observer` to
record each step or to die before it, and replace `flush`, which is slow.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ...core.disk import FULL, flush_folder
from ...core.errors import DiskSpaceError, StoreBusyError, StoreError
from ...core.location import StoreUrl

observer: Callable[[str], None] | None = None
flush = os.fsync


def announce(step: str) -> None:
    """Call the tests' observer before a step."""
    if observer is not None:
        observer(step)


def sync(file: IO[bytes]) -> None:
    """Flush a file's content to the disk."""
    file.flush()
    announce(f"sync {Path(file.name).name}")
    flush(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    announce(f"sync folder {path.name}")
    flush_folder(path, flush)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and flush its content, but not its folder: the name may be lost in a power failure."""
    announce(f"write {path.name}")
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def stage(folder: Path, key: str, content: bytes) -> Path:
    """Write the content of `key` to a folder of temporary files, flushed; return the file's path."""
    make_folder(folder)
    path = folder / temporary_name(key)
    write_synced(path, content)
    return path


def close(file: IO[bytes]) -> None:
    """Close a file whose content no longer matters, even if a full disk refuses to take its buffer."""
    with suppress(OSError):
        file.close()


def move_into_place(moves: Iterable[tuple[Path, Path]]) -> None:
    """Rename flushed files, given as (source, target), then flush the folders of the targets."""
    folders = {}
    for source, target in moves:
        announce(f"rename {target.name}")
        os.replace(source, target)
        folders[target.parent] = None
    for folder in folders:
        sync_folder(folder)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and flush each to disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    announce(f"make folder {path.name}")
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it, if it exists."""
    announce(f"remove {path.name}")
    shutil.rmtree(path, ignore_errors=True)


def temporary_name(key: str) -> str:
    """Return the name that `key` has in a folder of temporary files."""
    return key.replace("/", "~")


def lock(file: IO[bytes], store: Path | StoreUrl, shared: bool = False) -> None:
    """Lock the manifest for this process, or share the lock with its group, until the file is closed.

    Raises `StoreBusyError` if another process holds the lock.
    """
    try:
        fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreBusyError(
            f"another process is writing to the store '{store}'; wait until it ends, or choose another path"
        ) from None


@contextmanager
def disk_errors(store: Path) -> Iterator[None]:
    """Turn errors of the operating system into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (StoreError, DiskSpaceError)):
            raise
        if error.errno in FULL:
            raise DiskSpaceError(
                f"the disk of the store '{store}' is full; the committed shards stay readable: "
                "free some space and run the same command again"
            ) from error
        raise StoreError(
            f"cannot write the store '{store}': {error.strerror or error}; fix this and run the command again"
        ) from error
