"""Printable names of SAEs, and the names of their files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

LONGEST = 180
"""Largest length of a file name in bytes; it leaves room for suffixes and for the names of temporary files."""


def printable(name: str) -> str:
    r"""Return a name with bytes that are not UTF-8 and unprintable characters escaped, as `\xff`, and `\` as `\\`.

    Different names stay different.
    """
    text = name.replace("\\", "\\\\").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Return a unique file name, without a suffix, for each name.

    A `/` becomes `_`. Names that would then collide, even on a case-insensitive file system, and names that are too
    long are given a digest of the full name at their end.
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
