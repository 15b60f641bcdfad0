"""Dot products of chosen rows of two matrices, on a CPU."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.compute.cores import by_blocks


def dot_products(a: Tensor, b: Tensor, offsets: Tensor, indices: Tensor) -> Float[Tensor, " nnz"]:
    """Return `a_i . b_j` for the entries (i, j) of a CSR matrix."""
    _accept_sparse_tensors()
    products = a.new_empty(len(indices))

    def multiply(rows: slice) -> None:
        first, last = int(offsets[rows.start]), int(offsets[rows.stop])
        part = offsets[rows.start : rows.stop + 1] - first
        zeros = products[first:last].zero_()
        entries = torch.sparse_csr_tensor(part, indices[first:last], zeros, (len(part) - 1, len(b)))
        torch.sparse.sampled_addmm(entries, a[rows], b.T, beta=0, out=entries)

    by_blocks(multiply, len(a))
    return products


@cache
def _accept_sparse_tensors() -> None:
    """Create a first sparse matrix, so that PyTorch's one-time beta warning is suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
