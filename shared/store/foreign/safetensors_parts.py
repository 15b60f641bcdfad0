"""Safetensors files as parts: shapes from headers alone, and slices of single tensors."""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ...core.errors import StoreError
from .source import reading_foreign

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100 << 20


class TensorInfo(NamedTuple):
    """A tensor's shape and data type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def tensors_of(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors that a file's header names; raise `StoreError` for a file that is cut short."""
    with reading_foreign(path):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _MAX_HEADER:
                raise StoreError(f"'{path}' is no safetensors file: its header would have {size:,} bytes")
            header: dict[str, Any] = json.loads(file.read(size))
        header.pop("__metadata__", None)
        end = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if (found := path.stat().st_size) != end:
            raise StoreError(f"'{path}' has {found:,} bytes, but its header names {end:,}: it is cut short or damaged")
        return {
            name: TensorInfo(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], torch.complex64))
            for name, entry in header.items()
        }


def read_slice(path: Path, name: str, start: int, stop: int) -> Tensor:
    """Return `tensor[start:stop]` of one tensor in a file."""
    with reading_foreign(path):
        return _opened(path).get_slice(name)[start:stop]


@lru_cache(maxsize=16)
def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt", device="cpu").__enter__()
