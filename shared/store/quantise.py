"""Rows as int8 with one float32 scale each: x ~ scale * q, with |q| <= 127."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int8

LIMIT = 127


def quantise(rows: Float32[np.ndarray, "n d_in"]) -> tuple[Int8[np.ndarray, "n d_in"], Float32[np.ndarray, " n"]]:
    """Return the nearest (values, scales); a row of zeros has scale 0."""
    scales = np.abs(rows).max(axis=1) / np.float32(LIMIT)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    # A scale below float32's normal range has no finite inverse; such rows are stored as zeros.
    inverse[~np.isfinite(inverse)] = 0
    scaled = rows * inverse[:, None]
    return np.clip(np.rint(scaled, out=scaled), -LIMIT, LIMIT).astype(np.int8), scales


def dequantise(values: Int8[np.ndarray, "n d_in"], scales: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, "n d_in"]:
    """Return scale * q."""
    return values.astype(np.float32) * scales[:, None]
