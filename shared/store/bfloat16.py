"""Zarr's registered `bfloat16` extension data type, which zarr-python does not include.

Call `register_bfloat16()` before `zarr.open`: zarr-python 3.1.6 collects data types from the entry points of installed
packages, but never loads them. tensorstore supports bfloat16 without this.
https://github.com/zarr-developers/zarr-extensions/tree/main/data-types/bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.npy.float import BaseFloat


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """`ml_dtypes.bfloat16` as a Zarr data type."""

    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ("bfloat16",)

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> BFloat16:
        """Return the Zarr type of a NumPy dtype that is bfloat16."""
        if cls._check_native_dtype(dtype):
            return cls()
        from zarr.core.dtype.common import DataTypeValidationError

        raise DataTypeValidationError(f"expected bfloat16, got {dtype}")

    def to_native_dtype(self) -> Any:
        """Return the NumPy dtype."""
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def item_size(self) -> int:
        """Bytes of one value."""
        return 2


def register_bfloat16() -> None:
    """Register the data type with zarr-python in this process."""
    data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
