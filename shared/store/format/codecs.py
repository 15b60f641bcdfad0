"""The codecs: compress and decompress one chunk, and quantise rows to int8.

Call `encode_chunk` and `decode_chunk` from worker threads: there numcodecs uses blosc's contextual, single-threaded
mode and releases the interpreter lock.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from jaxtyping import Float32, Int8
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]

from ...core.errors import StoreError
from .layout import ArrayLayout
from .zarr_metadata import block_bytes_of, shuffle_of

QUANTISED_LIMIT = 96
"""The largest |q| of codec `int8`. Fewer steps than int8 has, because zstd codes the result by its entropy: halving the
number of steps saves one bit per value. On the bundled model 96 gives 0.45 of bfloat16's size at an NMSE of 1.4e-4, 127
gives 0.47 at 0.8e-4; an SAE's own error is 0.1 to 0.3."""

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
        raise StoreError(f"array '{array.name}': a compressed chunk of {stored.size} bytes is not a blosc buffer")
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


def quantise(rows: Float32[np.ndarray, "n d_in"]) -> tuple[Int8[np.ndarray, "n d_in"], Float32[np.ndarray, " n"]]:
    """Return (q, scales) so that each row is close to `scale * q` with |q| <= 96; a row of zeros has scale 0."""
    scales = np.abs(rows).max(axis=1) / np.float32(QUANTISED_LIMIT)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    # A scale below float32's normal range has no finite inverse: such a row is stored as zeros.
    inverse[~np.isfinite(inverse)] = 0
    scaled = rows * inverse[:, None]
    return np.clip(np.rint(scaled, out=scaled), -QUANTISED_LIMIT, QUANTISED_LIMIT).astype(np.int8), scales


def dequantise_rows(
    values: Int8[np.ndarray, "n d_in"], scales: Float32[np.ndarray, " n"]
) -> Float32[np.ndarray, "n d_in"]:
    """Return scale * q."""
    return values.astype(np.float32) * scales[:, None]
