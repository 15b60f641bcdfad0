"""The output folder of a run: one process at a time, files written whole, and errors that say what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..shared.disk import FULL
from ..shared.errors import ConfigError, DiskSpaceError, OutputBusyError, ThresherError

if TYPE_CHECKING:
    from .parallel.ranks import Ranks

LOCK_NAME = ".lock"
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that readers and crashes see the old or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(output: Path, ranks: Ranks) -> Iterator[None]:
    """Make the output folder, and hold its lock for this process or its group; a killed process loses it.

    Raises:
        OutputBusyError: another process trains into it.
    """
    file, refusal = None, None
    try:
        if ranks.first:
            try:
                output.mkdir(parents=True, exist_ok=True)
                file = _lock(output)
            except OutputBusyError as error:
                refusal = error
            except OSError as error:
                refusal = output_error(output, error) or error
        refusal = ranks.from_first(refusal)
        if refusal is not None:
            raise refusal
        yield
    finally:
        if file is not None:
            file.close()


def _lock(output: Path) -> IO[str] | None:
    """Return the locked file; None on a file system that has no locks."""
    file = (output / LOCK_NAME).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise OutputBusyError(
            f"another process{f' ({holder})' if holder else ''} is training into '{output}'; "
            "wait until it ends, or choose another output"
        ) from None
    except OSError as error:
        file.close()
        if error.errno not in _NO_LOCKS:
            raise
        return None
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


@contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write the output into errors that say what to do."""
    try:
        yield
    except OSError as error:
        refusal = output_error(output, error)
        if refusal is None:
            raise
        raise refusal from error


def output_error(output: Path, error: OSError) -> ThresherError | None:
    """Return what an error in writing the output is to the user; None if it is about something else."""
    elsewhere = error.filename is not None and not str(error.filename).startswith(str(output))
    if isinstance(error, ThresherError) or elsewhere:
        return None
    if error.errno in FULL:
        return DiskSpaceError(
            f"the disk of '{output}' is full; the last checkpoint is whole: make room, "
            "and start the same command again to resume from it"
        )
    if error.errno in _REFUSED:
        return ConfigError(
            f"cannot write to the output '{output}': {error.strerror}; fix this, or choose another output"
        )
    return None
