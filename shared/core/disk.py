"""Write files atomically, report in one line why a disk refuses, and check output folders before long work.

All files outside an activation store are written by `replacing` or `write_file`: readers and a crash see the old
content or the new, never a part of it. A store commits several files at once, in an order of its own
(`shared/store/local/durable.py`).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import ConfigError, DiskSpaceError, OutputError, ThresherError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers for a lack of space: on the disk, in the quota, or because of a limit on file sizes."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
"""The start of a URL that became a `Path`, which keeps only one of its slashes."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn operating system errors on writing to `path` into errors that say what to do.

    Raises:
        DiskSpaceError: the disk is full.
        OutputError: the path cannot be written for another reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code(error)
        if isinstance(error, ThresherError) or code is None:
            raise
        if code in FULL:
            raise DiskSpaceError(
                f"the disk is full: cannot write '{path}'; make room and run the same command again"
            ) from error
        raise OutputError(
            f"cannot write '{path}': {os.strerror(code)}; make it writable, or choose another path"
        ) from error


def _code(error: OSError | SafetensorError) -> int | None:
    """Return an error's number; safetensors gives it only in the message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path`, which replaces `path` when the block ends.

    Durable: the file is flushed to disk before it is renamed, and its folder afterwards, so the new content survives a
    power failure once the block has ended. An error within the block leaves `path` unchanged and no temporary file.

    Raises:
        DiskSpaceError: the disk is full.
        OutputError: the path cannot be written for another reason.
    """
    partial = _partial(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically and durably; raises the errors of `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder that the block may create; it replaces `path` when the block ends.

    If the block creates none, `path` is removed. Not durable and not fully atomic: nothing is flushed, and a crash
    between the two steps leaves no folder at `path`. Use it for files that can be made again. Raises the errors of
    `replacing`.
    """
    partial = _partial(path)
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)
        if partial.is_dir():
            os.replace(partial, path)


def flush_folder(path: Path, flush: Callable[[int], object] | None = None) -> None:
    """Flush a folder's entries to disk, by `flush` in place of `os.fsync` if given."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (flush or os.fsync)(handle)
    finally:
        os.close(handle)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def check_output(output: Path, store: object) -> None:
    """Refuse an output folder that is not writable or is inside the store at the path or URL `store`; write nothing.

    Raises:
        OutputError: the errors of `check_writable`.
        ConfigError: it is in the store.
    """
    check_writable(output)
    inside = output.resolve()
    if isinstance(store, Path) and store.resolve() in (inside, *inside.parents):
        raise ConfigError(f"the output '{output}' is in the store '{store}'; choose a folder outside it")


def check_writable(folder: Path) -> None:
    """Refuse a folder, existing or to be created, in which no files can be written; write nothing.

    Raises:
        OutputError: it is a URL, a part of the path is a file, or the existing folder is not writable.
    """
    if _SCHEME.fullmatch(folder.parts[0] if folder.parts else ""):
        raise OutputError(
            f"expected a folder on this machine, got the URL '{folder}'; choose a local folder and copy it"
        )
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise OutputError(f"expected '{folder}' to be a folder, but '{there}' is a file; choose another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write in '{there}'; make it writable, or choose another path than '{folder}'")
