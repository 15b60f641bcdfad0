"""Rows as the bits that are stored: conversion from tensors and arrays, and back to numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch

from ...core.errors import ConfigError, NonFiniteError

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BITS = {"bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2"), "float32": np.dtype("<u4")}
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
_MAGNITUDE = {"bfloat16": 0x7FFF, "float16": 0x7FFF, "float32": 0x7FFFFFFF}
_SCAN_BYTES = 256 << 10
_BLOCK_VALUES = 64 << 10
_local = threading.local()


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
    """Return the numbers that bits stand for as float32, which represents them exactly; a view if possible."""
    if dtype == "bfloat16":
        return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    return bits.view(np.float32) if dtype == "float32" else bits.view(np.float16).astype(np.float32)


def float64_blocks(bits: np.ndarray, dtype: str) -> Iterator[np.ndarray]:
    """Yield the numbers that bits stand for, a block of rows at a time; each block overwrites the one before."""
    d_in = bits.shape[1]
    step = max(1, _BLOCK_VALUES // d_in)
    wide, block = (buffer[: step * d_in].reshape(step, d_in) for buffer in _buffers(step * d_in))
    for start in range(0, len(bits), step):
        part = bits[start : start + step]
        n = len(part)
        if dtype == "bfloat16":
            np.copyto(wide[:n], part)
            np.left_shift(wide[:n], 16, out=wide[:n])
            part = wide[:n].view(np.float32)
        else:
            part = to_float32(part, dtype)
        np.copyto(block[:n], part)
        yield block[:n]


def _buffers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return this thread's uint32 and float64 buffers: allocating new ones would cost more than the conversion."""
    found: tuple[np.ndarray, np.ndarray] | None = getattr(_local, "buffers", None)
    if found is None or len(found[0]) < size:
        found = _local.buffers = np.empty(size, np.uint32), np.empty(size)
    return found


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
