"""Rows as the bits that are stored: conversion from tensors and arrays, and back to numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch

from ..errors import ConfigError, NonFiniteError

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BITS = {"bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2"), "float32": np.dtype("<u4")}
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
_MAGNITUDE = {"bfloat16": 0x7FFF, "float16": 0x7FFF, "float32": 0x7FFFFFFF}
_SCAN_BYTES = 256 << 10
_BLOCK_VALUES = 32 << 10


def to_bits(rows: Any, dtype: str, hook_point: str) -> np.ndarray:
    """Return rows, rounded to `dtype`, as an array of unsigned integers on the CPU of the same shape."""
    if isinstance(rows, np.ndarray) and rows.dtype == ml_dtypes.bfloat16:
        rows = torch.from_numpy(np.ascontiguousarray(rows).view(np.int16)).view(torch.bfloat16)
    elif isinstance(rows, np.ndarray):
        rows = torch.from_numpy(np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("=")))
    if not isinstance(rows, torch.Tensor) or not rows.is_floating_point():
        kind = getattr(rows, "dtype", type(rows).__name__)
        raise ConfigError(f"hook point '{hook_point}': expected a tensor or array of floats, got {kind}")
    converted = rows.detach().to(device="cpu", dtype=TORCH_DTYPES[dtype]).contiguous()
    signed = torch.int32 if dtype == "float32" else torch.int16
    return converted.view(signed).numpy().view(BITS[dtype])


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Return the numbers that bits stand for as float32, which holds them all; a view where it can be."""
    if dtype == "bfloat16":
        return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    return bits.view(np.float32) if dtype == "float32" else bits.view(np.float16).astype(np.float32)


def float64_blocks(bits: np.ndarray, dtype: str) -> Iterator[np.ndarray]:
    """Yield the numbers that bits stand for, some rows at a time, in one cache-sized float64 buffer."""
    step = max(1, _BLOCK_VALUES // bits.shape[1])
    buffer = np.empty((min(step, len(bits)), bits.shape[1]))
    for start in range(0, len(bits), step):
        part = bits[start : start + step]
        block = buffer[: len(part)]
        np.copyto(block, to_float32(part, dtype))
        yield block


def check_finite(bits: np.ndarray, dtype: str, hook_point: str, first_context: int) -> None:
    """Raise `NonFiniteError` naming the first context of `[n, context, d_in]` that holds NaN or infinity."""
    magnitude, infinity = BITS[dtype].type(_MAGNITUDE[dtype]), _INFINITY[dtype]
    flat = bits.reshape(-1)
    step = _SCAN_BYTES // flat.itemsize
    for start in range(0, flat.size, step):
        part = flat[start : start + step] & magnitude
        if part.max() >= infinity:
            at = start + int((part >= infinity).argmax())
            context = first_context + at // (bits[0].size)
            position = at % bits[0].size // bits.shape[-1]
            kind = "NaN" if int(flat[at]) & _MAGNITUDE[dtype] > infinity else f"a value beyond {dtype}'s range"
            raise NonFiniteError(
                f"hook point '{hook_point}', context {context}, position {position}: expected finite activations, "
                f"got {kind}; nothing of this batch was stored: check the model's weights and dtype"
            )
