"""Memory for windows, used again once nothing refers to it: fresh memory costs as much as the rows put into it."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

_OWN_REFERENCES = 3
"""What refers to an array that is free: the list, the loop's variable, and the count's argument."""


class Buffers:
    """At most `n_kept` arrays of one size; a tensor made from one, or a view of it, keeps it from being used again."""

    def __init__(self, n_bytes: int, n_kept: int) -> None:
        self._n_bytes = n_bytes
        self._n_kept = n_kept
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of any content, which is of no more than the size."""
        n_bytes = shape[0] * shape[1] * dtype.itemsize
        assert n_bytes <= self._n_bytes
        return torch.from_numpy(self._free()[:n_bytes]).view(dtype).view(shape)

    def _free(self) -> np.ndarray:
        for array in self._arrays:
            if sys.getrefcount(array) == _OWN_REFERENCES:
                return array
        # NumPy asks for huge pages, which rows in random places want; PyTorch does not.
        array = np.empty(self._n_bytes, dtype=np.uint8)
        self._arrays = [*self._arrays, array][-self._n_kept :]
        return array
