"""The output folder of a run, locked for one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ...shared.core.disk import writing
from ...shared.core.errors import OutputBusyError, ThresherError

if TYPE_CHECKING:
    from ...shared.core.compute.processes import Ranks

LOCK_NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def locked(output: Path, ranks: Ranks) -> Iterator[None]:
    """Create the output folder and hold its lock for this process or its group; it is released when they end.

    Raises:
        OutputBusyError: another process trains into it.
        OutputError, DiskSpaceError: it cannot be written.
    """
    file, refusal = None, None
    try:
        if ranks.first:
            try:
                with writing(output):
                    output.mkdir(parents=True, exist_ok=True)
                    file = _lock(output)
            except ThresherError as error:
                refusal = error
        refusal = ranks.from_first(refusal)
        if refusal is not None:
            raise refusal
        yield
    finally:
        if file is not None:
            file.close()


def _lock(output: Path) -> IO[str] | None:
    """Return the locked file, or None on a file system without locks."""
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
