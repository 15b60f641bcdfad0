"""Products of sparse latents and dense matrices on a CPU, by `embedding_bag` and sampled products.

Latents are CSR by row: `values [nnz]`, `indices [nnz]` (int64) and `offsets [batch_plus_1]`; TopK has k entries in
every row. Operations use the dtype of their inputs; gradients are tested in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ....shared.core.compute.cores import by_blocks
from .csc import Csc, to_csc
from .dots import dot_products
from .gradient import weighted_sums

_CACHE_BYTES = 8 << 20


def decode(
    values: Float[Tensor, " nnz"],
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " batch_plus_1"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "batch d_out"]:
    """Return `sum_j values_j W_dec[indices_j]` for each row, with terms in the dtype of `W_dec`, sums in float32."""
    weights = values.to(W_dec.dtype)
    x_hat = values.new_empty(len(offsets) - 1, W_dec.shape[1])

    def sum_rows(rows: slice) -> None:
        x_hat[rows] = weighted_sums(W_dec, indices, offsets[rows.start : rows.stop + 1], weights)

    by_blocks(sum_rows, len(x_hat))
    return x_hat


def grad_values(
    g: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "d_sae d_out"],
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " batch_plus_1"],
    csc: Csc | None = None,
) -> Float[Tensor, " nnz"]:
    """Return `g[row_j] . W_dec[indices_j]` for each entry.

    The rows of the smaller matrix are gathered while those of the other are read in order. If `W_dec` fits in the
    cache, nothing is sorted. Pass `csc` from `to_csc` to sort once for several calls.
    """
    if W_dec.nbytes <= (g.nbytes if csc is not None else max(_CACHE_BYTES, g.nbytes)):
        return dot_products(g, W_dec, offsets, indices)
    csc = csc or to_csc(indices, offsets, len(W_dec))
    by_latent = dot_products(W_dec, g, csc.offsets, csc.rows)
    return torch.empty_like(by_latent).scatter_(0, csc.order, by_latent)


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
    weights, sums = values.index_select(0, csc.order), g.new_empty(d_sae, g.shape[1])

    def sum_rows(part: slice) -> None:
        sums[part] = weighted_sums(g, csc.rows, csc.offsets[part.start : part.stop + 1], weights)

    by_blocks(sum_rows, d_sae)
    return sums


def sum_by_latent(
    values: Float[Tensor, " nnz"],
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " batch_plus_1"],
    d_sae: int,
    csc: Csc | None = None,
) -> Float[Tensor, " d_sae"]:
    """Return the sum of each latent's values, added in order of row; this needs no sorting."""
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
