"""The roles of rows: the codes of a store's `roles` array (docs/FORMAT.md)."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.errors import ConfigError

ROLE_NAMES = ("placed", "text", "marker", "system", "user", "assistant", "tool", "other")
"""The name of each code, in order."""

PLACED, TEXT, MARKER, SYSTEM, USER, ASSISTANT, TOOL, OTHER = range(len(ROLE_NAMES))
N_ROLES = len(ROLE_NAMES)


def role_codes(names: Sequence[str]) -> tuple[int, ...]:
    """Return the codes of roles to which a reader can be limited, in increasing order.

    Raises:
        ConfigError: a name is not one of `ROLE_NAMES`, or it is `placed`, whose rows are always masked.
    """
    usable = ROLE_NAMES[1:]
    if isinstance(names, str) or not names:
        raise ConfigError(f"expected roles to be a list of {', '.join(usable)}; got {names!r}")
    for name in names:
        if name not in usable:
            raise ConfigError(f"expected roles of {', '.join(usable)}; got '{name}'")
    return tuple(sorted({ROLE_NAMES.index(name) for name in names}))
