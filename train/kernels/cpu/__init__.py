"""The sparse operations on a CPU: one GEMM in row blocks, and `embedding_bag` for the rest.

Latents are CSR by row: `values [nnz]`, `indices [nnz]` (int64) and `offsets [batch + 1]`; TopK is the
case of k entries in every row. The operations follow the dtype of their inputs, so the encoder's
GEMM runs in bfloat16 where it is given bfloat16 copies, and gradients are checked in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ....shared.core.cores import by_blocks, even_blocks, on_cores
from .csc import Csc, row_of_entry, to_csc
from .dots import dot_products
from .gradient import WeightGradient, weighted_sums
from .screen import screened_topk
from .threshold import Entries, entries_at_least, largest_of_batch
from .topk import n_parts, topk_of_parts

__all__ = [
    "Csc",
    "WeightGradient",
    "decode",
    "entries_above",
    "grad_values",
    "grad_weights",
    "grad_weights_and_bias",
    "largest_of_batch",
    "pre_activations",
    "row_of_entry",
    "screened_topk",
    "select_topk",
    "sum_by_latent",
    "to_csc",
]

_CACHE_BYTES = 8 << 20
_WORTH_PACKING = 8 << 20
_LEAST_ROWS, _MOST_ROWS, _BLOCK_ENTRIES = 128, 1024, 6 << 20


def pre_activations(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """Return `x W_enc^T + b_enc` in the dtype of `x`."""
    bias, out = b_enc.to(x.dtype), x.new_empty(len(x), len(W_enc))
    by_blocks(lambda rows: torch.addmm(bias, x[rows], W_enc.T, out=out[rows]), len(x))
    return out


def select_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Return the k largest pre-activations of each row, after ReLU, and their latents (unsorted)."""
    acts = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    blocks = row_blocks(len(x), len(W_enc))
    parts = n_parts(x.dtype, len(W_enc), k)
    weights, bias = _packed(W_enc.chunk(parts), len(x) // len(blocks)), b_enc.to(x.dtype).chunk(parts)

    def select(rows: slice) -> None:
        made = [_linear(x[rows], W, b) for W, b in zip(weights, bias, strict=True)]
        values, indices[rows] = topk_of_parts(made, k)
        acts[rows] = values.relu_()

    on_cores(select, blocks)
    return acts, indices


def entries_above(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"] | float,
    most: float,
) -> Entries | None:
    """Return indices and offsets of the pre-activations above a threshold, in no order within a row.

    None is returned where more than a share `most` of a block of rows is above, or where the latents do not group.
    """
    bias = (b_enc - threshold).to(x.dtype)
    smallest = torch.finfo(x.dtype).smallest_normal
    some_refused = False

    def search(rows: slice) -> Entries | None:
        nonlocal some_refused
        if some_refused:
            return None
        found = entries_at_least(_linear(x[rows], W_enc, bias), smallest)
        if found is None or len(found[0]) > most * (rows.stop - rows.start) * len(W_enc):
            some_refused = True
            return None
        return found

    parts = on_cores(search, row_blocks(len(x), len(W_enc)))
    there = [part for part in parts if part is not None]
    if len(there) < len(parts):
        return None
    counts = torch.cat([offsets.diff() for _, offsets in there])
    return torch.cat([indices for indices, _ in there]), F.pad(counts.cumsum(0), (1, 0))


def row_blocks(n_rows: int, d_sae: int) -> list[slice]:
    """Return blocks of rows: enough for the product to be fast, and few enough for cores to share them."""
    return even_blocks(n_rows, max(_LEAST_ROWS, min(_MOST_ROWS, _BLOCK_ENTRIES // d_sae)))


def _linear(x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """Return `x W^T + bias`; in bfloat16 by the operator that adds the bias as it goes, to equal bits."""
    if x.dtype is torch.bfloat16 and _multiplies_bfloat16():
        return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return F.linear(x, W, bias)


def _packed(weights: Sequence[Tensor], n_rows: int) -> Sequence[Tensor]:
    """Return weights laid out once as the product wants them, for several blocks of rows, where they are large."""
    if weights[0].dtype is not torch.bfloat16 or not _multiplies_bfloat16():
        return weights
    if sum(W.nbytes for W in weights) < _WORTH_PACKING:
        return weights
    return on_cores(lambda W: torch.ops.mkldnn._reorder_linear_weight(W, n_rows), weights)


@cache
def _multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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

    The rows of the smaller matrix are gathered, those of the other gone through in order; but for rows of `W_dec` that
    fit the cache nothing is sorted. Pass `csc` from `to_csc` to sort once for several calls.
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
