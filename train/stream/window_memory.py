"""Memory for windows, reused once nothing refers to it: allocating it costs as much as writing the rows."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

_OWN_REFERENCES = 3
"""References to a free array: the list, the loop variable, and the argument of `getrefcount`."""


class WindowBuffers:
    """At most `n_kept` arrays of one size. An array is in use while a tensor made from it, or a view, exists."""

    def __init__(self, n_bytes: int, n_kept: int) -> None:
        self._n_bytes = n_bytes
        self._n_kept = n_kept
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return a tensor with undefined content that fits in the arrays' size."""
        n_bytes = shape[0] * shape[1] * dtype.itemsize
        assert n_bytes <= self._n_bytes
        return torch.from_numpy(self._free()[:n_bytes]).view(dtype).view(shape)

    def _free(self) -> np.ndarray:
        for array in self._arrays:
            if sys.getrefcount(array) == _OWN_REFERENCES:
                return array
        # NumPy requests huge pages, which speed up access to random rows; PyTorch does not.
        array = np.empty(self._n_bytes, dtype=np.uint8)
        self._arrays = [*self._arrays, array][-self._n_kept :]
        return array
