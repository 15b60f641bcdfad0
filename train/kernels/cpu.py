"""The sparse operations on a CPU: one GEMM in row blocks, and `embedding_bag` for the rest.

Latents are CSR by row: `values [nnz]`, `indices [nnz]` (int64) and `offsets [batch + 1]`; TopK is the
case of k entries in every row. The operations follow the dtype of their inputs, so the encoder's
GEMM runs in bfloat16 where it is given bfloat16 copies, and gradients are checked in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from .cpu_topk import topk_of_rows

_LEAST_ROWS, _MOST_ROWS, _BLOCK_ENTRIES = 256, 1024, 1 << 22
_SUM = 0
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
    """Sort entries by latent, stably; NumPy's 16-bit sort is a radix sort and so takes linear time."""
    keys = indices.numpy()
    order = np.argsort(keys.astype(np.uint16) if d_sae <= _RADIX_LIMIT else keys, kind="stable")
    counts = torch.bincount(indices, minlength=d_sae)
    column_offsets = torch.zeros(d_sae + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=column_offsets[1:])
    permutation = torch.from_numpy(order)
    return Csc(permutation, row_of_entry(offsets)[permutation], column_offsets)


def pre_activations(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """Return `x W_enc^T + b_enc` in the dtype of `x`."""
    return F.linear(x, W_enc, b_enc.to(x.dtype))


def select_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Return the k largest pre-activations of each row, after ReLU, and their latents (unsorted)."""
    bias = b_enc.to(x.dtype)
    acts = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    for rows in row_blocks(len(x), len(W_enc)):
        acts[rows], indices[rows] = topk_of_rows(F.linear(x[rows], W_enc, bias), k)
    return acts.relu_(), indices


def row_blocks(n_rows: int, d_sae: int) -> list[slice]:
    """Return blocks of rows whose pre-activations stay in cache until they are chosen from."""
    rows = max(_LEAST_ROWS, min(_MOST_ROWS, _BLOCK_ENTRIES // d_sae))
    return [slice(start, start + rows) for start in range(0, n_rows, rows)]


def decode(
    values: Float[Tensor, " nnz"],
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " batch_plus_1"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "batch d_out"]:
    """Return `sum_j values_j W_dec[indices_j]` for each row."""
    return F.embedding_bag(indices, W_dec, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


def grad_values(
    g: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "d_sae d_out"],
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " batch_plus_1"],
) -> Float[Tensor, " nnz"]:
    """Return `g[row_j] . W_dec[indices_j]` for each entry."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g, W_dec, indices, offsets, row_of_entry(offsets), _SUM
    )


def grad_weights(
    values: Float[Tensor, " nnz"],
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " batch_plus_1"],
    g: Float[Tensor, "batch d_out"],
    d_sae: int,
    csc: Csc | None = None,
) -> Float[Tensor, "d_sae d_out"]:
    """Return, for each latent, the sum of `values_j g[row_j]` over its entries, in order of row.

    Pass `csc` from `to_csc` to sort once for several calls.
    """
    csc = csc or to_csc(indices, offsets, d_sae)
    weights = values[csc.order]
    return F.embedding_bag(csc.rows, g, csc.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def sum_by_latent(
    values: Float[Tensor, " nnz"],
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " batch_plus_1"],
    d_sae: int,
    csc: Csc | None = None,
) -> Float[Tensor, " d_sae"]:
    """Return the sum of each latent's values, added in order of row; nothing needs sorting for that here."""
    return values.new_zeros(d_sae).index_add_(0, indices, values)


def grad_weights_and_bias(
    values: Float[Tensor, " nnz"],
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " batch_plus_1"],
    g: Float[Tensor, "batch d_out"],
    d_sae: int,
    csc: Csc | None = None,
) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, " d_sae"]]:
    """Return `grad_weights` and `sum_by_latent` of the same values."""
    return grad_weights(values, indices, offsets, g, d_sae, csc), sum_by_latent(values, indices, offsets, d_sae)
