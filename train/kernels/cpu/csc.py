"""Sort sparse latents by latent on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

_RADIX_LIMIT = 1 << 16


class Csc(NamedTuple):
    """Entries of a CSR matrix in order of their latent, ties in order of their row."""

    order: Int64[Tensor, " nnz"]
    rows: Int64[Tensor, " nnz"]
    offsets: Int64[Tensor, " d_sae_plus_1"]


def row_of_entry(offsets: Int64[Tensor, " batch_plus_1"]) -> Int64[Tensor, " nnz"]:
    """Return the row that each entry belongs to."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


def to_csc(indices: Int64[Tensor, " nnz"], offsets: Int64[Tensor, " batch_plus_1"], d_sae: int) -> Csc:
    """Sort entries by latent, stably."""
    return csc_of(indices, row_of_entry(offsets), d_sae)


def csc_of(indices: Int64[Tensor, " nnz"], rows: Int64[Tensor, " nnz"], d_sae: int) -> Csc:
    """Sort entries by latent, stably; NumPy's 16-bit sort is a radix sort and so takes linear time."""
    keys = indices.numpy()
    order = np.argsort(keys.astype(np.uint16) if d_sae <= _RADIX_LIMIT else keys, kind="stable")
    counts = torch.bincount(indices, minlength=d_sae)
    column_offsets = torch.zeros(d_sae + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=column_offsets[1:])
    permutation = torch.from_numpy(order)
    return Csc(permutation, rows.index_select(0, permutation), column_offsets)
