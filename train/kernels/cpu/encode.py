"""The encoder on a CPU: a product in row blocks, with the selection in each block while it is in cache.

Operations use the dtype of their inputs: the product runs in bfloat16 if it is given bfloat16 copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ....shared.core.compute.cores import by_blocks, even_blocks, on_cores
from ..entries import Entries
from .threshold import entries_at_least
from .topk import n_parts, topk_of_parts

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


def search_above(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"] | float,
    most: float,
) -> Entries | None:
    """Return the entries whose pre-activation is above a threshold, unsorted within a row.

    Returns None if more than a fraction `most` of a block of rows is above it, or if the latents cannot be grouped.
    """
    bias = (b_enc - threshold).to(x.dtype)
    smallest = torch.finfo(x.dtype).smallest_normal
    gave_up = False

    def search(rows: slice) -> Entries | None:
        nonlocal gave_up
        if gave_up:
            return None
        found = entries_at_least(_linear(x[rows], W_enc, bias), smallest)
        if found is None or len(found[0]) > most * (rows.stop - rows.start) * len(W_enc):
            gave_up = True
            return None
        return found

    parts = on_cores(search, row_blocks(len(x), len(W_enc)))
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    counts = torch.cat([offsets.diff() for _, offsets in found])
    return Entries(torch.cat([indices for indices, _ in found]), F.pad(counts.cumsum(0), (1, 0)))


def row_blocks(n_rows: int, d_sae: int) -> list[slice]:
    """Return blocks of rows, large enough for a fast product and small enough to keep all cores busy."""
    return even_blocks(n_rows, max(_LEAST_ROWS, min(_MOST_ROWS, _BLOCK_ENTRIES // d_sae)))


def _linear(x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """Return `x W^T + bias`; in bfloat16 by the operator that fuses the bias, which gives the same bits."""
    if x.dtype is torch.bfloat16 and _multiplies_bfloat16():
        return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return F.linear(x, W, bias)


def _packed(weights: Sequence[Tensor], n_rows: int) -> Sequence[Tensor]:
    """Return large weights packed once into the product's layout, for use with several blocks of rows."""
    if weights[0].dtype is not torch.bfloat16 or not _multiplies_bfloat16():
        return weights
    if sum(W.nbytes for W in weights) < _WORTH_PACKING:
        return weights
    return on_cores(lambda W: torch.ops.mkldnn._reorder_linear_weight(W, n_rows), weights)


@cache
def _multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
