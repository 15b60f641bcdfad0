"""What a format of SAEs must provide: how it is recognised, read and, where that is supported, written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .parts import SaeParts


class SaeFormat(NamedTuple):
    """A format of SAE files.

    `find` returns the paths of the SAEs that a folder or file itself holds, not those in its sub-folders; `read` and
    `write` take such a path. `layout` says in words which files it has. A format whose SAEs are folders names in
    `config_name` the file that must be there.
    """

    name: str
    layout: str
    find: Callable[[Path], list[Path]]
    read: Callable[[Path], SaeParts]
    write: Callable[[SaeParts, Path], None] | None = None
    config_name: str = ""
    weights_name: Callable[[Path], str] = lambda folder: ""


def folders(recognises: Callable[[Path], bool]) -> Callable[[Path], list[Path]]:
    """Return the `find` of a format in which a folder is an SAE."""
    return lambda path: [path] if recognises(path) else []
