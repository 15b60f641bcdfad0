"""Rows as int8 with one float32 scale each: x ~ scale * q, with |q| <= 96.

Fewer steps than int8 has, because zstd codes what is left by its entropy: each halving of the
steps saves a bit a value. On the bundled model 96 gives 0.45 of bfloat16 at an NMSE of 1.4e-4,
127 gives 0.47 at 0.8e-4; an SAE's own error is 0.1 to 0.3.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int8

LIMIT = 96


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
