"""CRC-32C, the checksum of Zarr's `crc32c` codec and of every file of a store."""

from __future__ import annotations

from typing import Any

import google_crc32c


def crc32c(data: Any, initial: int = 0) -> int:
    """Return the CRC-32C of bytes or of a contiguous NumPy array, continued from `initial`."""
    return google_crc32c.extend(initial, data)
