"""Effects on the disk in an order that survives a kill or a power cut at any moment.

Files are written under temporary names, flushed, renamed, and only then named in the manifest.
Tests set `observer` to see, or die at, each step, and replace `flush`, which is slow.
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
    """Tell the tests' observer that `step` is about to happen."""
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
    """Write a file and flush its content; its name is not yet safe."""
    announce(f"write {path.name}")
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def stage(folder: Path, key: str, content: bytes) -> Path:
    """Write what will be `key` in the store, flushed, into a folder of temporary files; return where it lies."""
    make_folder(folder)
    path = folder / temporary_name(key)
    write_synced(path, content)
    return path


def close(file: IO[bytes]) -> None:
    """Close a file that is given up, even where a full disk refuses what is still in its buffer."""
    with suppress(OSError):
        file.close()


def move_into_place(moves: Iterable[tuple[Path, Path]]) -> None:
    """Rename flushed files to their final names, then flush the folders that changed."""
    folders = {}
    for source, target in moves:
        announce(f"rename {target.name}")
        os.replace(source, target)
        folders[target.parent] = None
    for folder in folders:
        sync_folder(folder)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each safe on disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    announce(f"make folder {path.name}")
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, if it is there."""
    announce(f"remove {path.name}")
    shutil.rmtree(path, ignore_errors=True)


def temporary_name(key: str) -> str:
    """Return the name, in a folder of temporary files, of what will be `key` in the store."""
    return key.replace("/", "~")


def lock(file: IO[bytes], store: Path | StoreUrl, shared: bool = False) -> None:
    """Lock the manifest for this process, or share it with its group, until the file is closed.

    Raises `StoreBusyError` if another process has it.
    """
    try:
        fcntl.flock(file.fileno(), (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreBusyError(
            f"another process is writing to the store '{store}'; wait until it ends, or name another path"
        ) from None


@contextmanager
def disk_errors(store: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (StoreError, DiskSpaceError)):
            raise
        if error.errno in FULL:
            raise DiskSpaceError(
                f"the disk of the store '{store}' is full; what is committed stays readable: "
                "make room and start the same command again"
            ) from error
        raise StoreError(
            f"cannot write the store '{store}': {error.strerror or error}; mend that and start again"
        ) from error
