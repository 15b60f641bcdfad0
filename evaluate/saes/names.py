"""Names of SAEs as text that every file and terminal can hold, and the names of their files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

LONGEST = 180
"""Bytes of a file's name, which leaves room for the endings and temporary names that come with it."""


def printable(name: str) -> str:
    r"""Return a name with whatever is not UTF-8 or cannot be printed as an escape such as `\xff`, and `\` as `\\`.

    Different names stay different.
    """
    text = name.replace("\\", "\\\\").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Return a file name for each name, without an ending, no two alike.

    A `/` becomes `_`. Names that would then be the same file (also where case makes no difference), and names that
    are too long for one, get a digest of the whole name at their end.
    """
    plain = {name: name.replace("/", "_") for name in names}
    times = Counter(file.casefold() for file in plain.values())
    return {
        name: file if times[file.casefold()] == 1 and len(file.encode()) <= LONGEST else _with_digest(name, file)
        for name, file in plain.items()
    }


def _with_digest(name: str, file: str) -> str:
    short = file.encode()[: LONGEST - 20].decode(errors="ignore")
    return f"{short}-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"
