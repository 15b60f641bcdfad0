"""Compress one chunk's bytes, and decompress them straight into where they belong.

Only blosc's contextual, single-threaded mode is used: call these from worker threads, where
numcodecs selects it and releases the interpreter lock.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]

from ...core.errors import StoreError
from .layout import ArrayLayout
from .zarr_metadata import block_bytes_of, shuffle_of

_BLOSC_HEADER = struct.Struct("<4B3I")
_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def encode_chunk(array: ArrayLayout, rows: np.ndarray, level: int) -> Any:
    """Return the stored bytes, checksum excluded, of one full chunk of little-endian rows."""
    if array.codec == "none":
        return rows.reshape(-1).view(np.uint8)
    return blosc.compress(rows, array.codec.encode(), level, _SHUFFLES[shuffle_of(array)], block_bytes_of(array))


def decode_chunk(array: ArrayLayout, stored: np.ndarray, out: np.ndarray) -> None:
    """Decode a chunk's stored bytes into `out`, a contiguous uint8 array of the chunk's size."""
    if array.codec == "none":
        if stored.size != out.size:
            raise StoreError(f"array '{array.name}': expected a chunk of {out.size} bytes, got {stored.size}")
        np.copyto(out, stored)
        return
    if stored.size < _BLOSC_HEADER.size:
        raise StoreError(f"array '{array.name}': a compressed chunk of {stored.size} bytes is no blosc buffer")
    *_, n_bytes, _block_bytes, stored_bytes = _BLOSC_HEADER.unpack(stored[: _BLOSC_HEADER.size].tobytes())
    if (n_bytes, stored_bytes) != (out.size, stored.size):
        raise StoreError(
            f"array '{array.name}': expected a blosc buffer of {out.size} bytes in {stored.size}, "
            f"got one that says {n_bytes} in {stored_bytes}"
        )
    try:
        blosc.decompress(stored, out)
    except RuntimeError as error:
        raise StoreError(f"array '{array.name}': blosc cannot decompress a chunk ({error})") from None
