"""The version of this package that is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def thresher_version() -> str:
    """Return the installed version, "0+unknown" where the source is only on the path."""
    try:
        return version("thresher")
    except PackageNotFoundError:
        return "0+unknown"
