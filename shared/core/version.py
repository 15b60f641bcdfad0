"""The installed version of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def thresher_version() -> str:
    """Return the installed version; "0+unknown" if the package is not installed."""
    try:
        return version("thresher")
    except PackageNotFoundError:
        return "0+unknown"
