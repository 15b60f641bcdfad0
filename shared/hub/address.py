"""Addresses on the Hugging Face Hub: `hf://USER/REPO/path@revision`, and `hf://datasets/USER/REPO` of a data set."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..core.errors import ConfigError, HubError

_ADDRESS = re.compile(r"hf:/{1,2}(datasets/)?((?!datasets/)[\w.-]+/[\w.-]+)((?:/[^@]*)?)(?:@([^@]+))?")
"""A `Path` keeps only one of the two slashes."""


class HubAddress(NamedTuple):
    """A repository, a path in it, empty for all of it, and a revision, empty for the newest."""

    repository: str
    path: str = ""
    revision: str = ""
    kind: str = "model"

    def __str__(self) -> str:
        """Return the address as it is written."""
        kind = "datasets/" if self.kind == "dataset" else ""
        path = f"/{self.path}" if self.path else ""
        return f"hf://{kind}{self.repository}{path}{f'@{self.revision}' if self.revision else ''}"

    def at(self, path: str) -> HubAddress:
        """Return the address of another path of the repository."""
        return self._replace(path=path)


def is_hub_address(name: object) -> bool:
    """Return whether a name is meant as an address on the Hub."""
    return str(name).startswith("hf:/")


def parse_address(name: str) -> HubAddress:
    """Return the parts of an address.

    Raises:
        HubError: it is not one.
    """
    found = _ADDRESS.fullmatch(name)
    path = found[3].strip("/") if found else ""
    if found is None or any(part in (".", "..", "") for part in path.split("/") if path):
        raise HubError(f"'{name}' is not an address on the Hub; expected hf://USER/REPO/path@revision")
    return HubAddress(found[2], path, found[4] or "", "dataset" if found[1] else "model")


def repository_address(name: str, kind: str = "model") -> HubAddress:
    """Return the address of a whole repository that a user names as USER/NAME.

    Raises:
        ConfigError: it is no such name, or more than one.
    """
    prefix = "datasets/" if kind == "dataset" else ""
    try:
        address = parse_address(f"hf://{prefix}{name}")
    except HubError:
        raise ConfigError(f"'{name}' is not a repository on the Hub; expected --repo USER/NAME") from None
    if address.path or address.revision or address.kind != kind:
        raise ConfigError(f"'{name}' is more than a repository; expected --repo USER/NAME")
    return address
