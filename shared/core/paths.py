"""Paths as users write them: `~` is the home folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from .errors import ConfigError

_T = TypeVar("_T")
_HOME = re.compile(r"~[^/\s]*(/|$)")


def user_path(path: str | Path) -> Path:
    """Return the path with a leading `~` or `~user` expanded; raise `ConfigError` for a user without a home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"no home folder is known for '{path}'; write the path in full") from None


def expand_home(value: _T) -> _T:
    """Expand `~/...` and `~user/...` in a string or path, or in every one inside lists and tables.

    A lone `~` is left as it is, because it may be a token rather than a path.
    """
    expanded: Any = value
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value and _HOME.match(value)):
        expanded = type(value)(user_path(value))
    elif isinstance(value, dict):
        expanded = {key: expand_home(item) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        expanded = type(value)(expand_home(item) for item in value)
    return expanded
