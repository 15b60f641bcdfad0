"""Gradients of the weights: one program a latent, over the entries sorted by latent. No atomics.

A hot latent's entries are cut in segments of at most `MAX_SEGMENT`, summed by programs of their own
into a buffer, and its program adds those partial sums in their order: two runs agree in every bit.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ..csc import SegmentedCsc, to_csc
from .token_major import row_tiling


@triton.jit
def sum_entries(
    values_ptr,
    order_ptr,
    rows_ptr,
    matrix_ptr,
    stride,
    start,
    stop,
    d,
    d_in,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    """Return `sum_j values_j matrix[row_j]` over sorted entries, and the values' own sum."""
    total = tl.zeros([ENTRIES, D], tl.float32)
    values_total = tl.zeros([ENTRIES], tl.float32)
    for first in range(start, stop, ENTRIES):
        places = first + tl.arange(0, ENTRIES)
        inside = places < stop
        entry = tl.load(order_ptr + places, mask=inside, other=0)
        row = tl.load(rows_ptr + places, mask=inside, other=0).to(tl.int64)
        value = tl.load(values_ptr + entry, mask=inside, other=0.0).to(tl.float32)
        mask = inside[:, None] & (d < d_in)[None, :]
        terms = tl.load(matrix_ptr + row[:, None] * stride + d[None, :], mask=mask, other=0.0)
        total += value[:, None] * terms.to(tl.float32)
        values_total += value
    return tl.sum(total, axis=0), tl.sum(values_total, axis=0)


@triton.jit
def segments_kernel(
    values_ptr,
    order_ptr,
    rows_ptr,
    matrix_ptr,
    stride,
    starts_ptr,
    segment_starts_ptr,
    segment_latents_ptr,
    partial_ptr,
    partial_values_ptr,
    d_sae,
    d_in,
    MAX_SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    if segment >= tl.load(segment_starts_ptr + d_sae):
        return
    latent = tl.load(segment_latents_ptr + segment)
    within = segment - tl.load(segment_starts_ptr + latent)
    start = tl.load(starts_ptr + latent) + within * MAX_SEGMENT
    stop = tl.minimum(start + MAX_SEGMENT, tl.load(starts_ptr + latent + 1))
    d = tl.arange(0, D)
    total, values_total = sum_entries(
        values_ptr, order_ptr, rows_ptr, matrix_ptr, stride, start, stop, d, d_in, ENTRIES, D
    )
    tl.store(partial_ptr + segment * d_in + d, total, mask=d < d_in)
    tl.store(partial_values_ptr + segment, values_total)


@triton.jit
def sum_latent(
    latent,
    values_ptr,
    order_ptr,
    rows_ptr,
    matrix_ptr,
    stride,
    starts_ptr,
    segment_starts_ptr,
    partial_ptr,
    partial_values_ptr,
    d,
    d_in,
    MAX_SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    """Return the sum over a latent's entries, or over its segments if it is hot, and the sum of its values."""
    start = tl.load(starts_ptr + latent)
    stop = tl.load(starts_ptr + latent + 1)
    hot = stop - start > MAX_SEGMENT
    total, values_total = sum_entries(
        values_ptr,
        order_ptr,
        rows_ptr,
        matrix_ptr,
        stride,
        start,
        tl.where(hot, start, stop),
        d,
        d_in,
        ENTRIES,
        D,
    )
    for segment in range(tl.load(segment_starts_ptr + latent), tl.load(segment_starts_ptr + latent + 1)):
        total += tl.load(partial_ptr + segment * d_in + d, mask=d < d_in, other=0.0)
        values_total += tl.load(partial_values_ptr + segment)
    return total, values_total


@triton.jit
def grad_weights_kernel(
    values_ptr,
    order_ptr,
    rows_ptr,
    matrix_ptr,
    stride,
    starts_ptr,
    segment_starts_ptr,
    partial_ptr,
    partial_values_ptr,
    out_ptr,
    out_values_ptr,
    d_in,
    MAX_SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    total, values_total = sum_latent(
        latent,
        values_ptr,
        order_ptr,
        rows_ptr,
        matrix_ptr,
        stride,
        starts_ptr,
        segment_starts_ptr,
        partial_ptr,
        partial_values_ptr,
        d,
        d_in,
        MAX_SEGMENT,
        ENTRIES,
        D,
    )
    tl.store(out_ptr + latent * d_in + d, total, mask=d < d_in)
    tl.store(out_values_ptr + latent, values_total)


def sum_segments(
    values: Float[Tensor, " nnz"], csc: SegmentedCsc, matrix: Float[Tensor, "rows d_in"]
) -> tuple[Float[Tensor, "n_segments d_in"], Float[Tensor, " n_segments"]]:
    """Return the partial sums of hot latents; the rest of the buffers is undefined."""
    capacity, d_in = len(csc.segment_latents), matrix.shape[1]
    assert matrix.stride(1) == 1
    partial = torch.empty(capacity, d_in, dtype=torch.float32, device=matrix.device)
    partial_values = torch.empty(capacity, dtype=torch.float32, device=matrix.device)
    tiling = row_tiling(d_in)
    segments_kernel[(capacity,)](
        values,
        csc.order,
        csc.rows,
        matrix,
        matrix.stride(0),
        csc.starts,
        csc.segment_starts,
        csc.segment_latents,
        partial,
        partial_values,
        len(csc.starts) - 1,
        d_in,
        MAX_SEGMENT=csc.max_segment,
        **tiling.launch,
    )
    return partial, partial_values


def grad_weights_and_bias(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    g: Float[Tensor, "batch d_in"],
    d_sae: int,
    csc: SegmentedCsc | None = None,
) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, " d_sae"]]:
    """Return each latent's sum of `values_j g[row_j]`, and of `values_j`; zero for an unused latent."""
    csc, d_in = csc or to_csc(indices, offsets, d_sae), g.shape[1]
    partial, partial_values = sum_segments(values, csc, g)
    out = torch.empty(d_sae, d_in, dtype=torch.float32, device=g.device)
    out_values = torch.empty(d_sae, dtype=torch.float32, device=g.device)
    tiling = row_tiling(d_in)
    grad_weights_kernel[(d_sae,)](
        values,
        csc.order,
        csc.rows,
        g,
        g.stride(0),
        csc.starts,
        csc.segment_starts,
        partial,
        partial_values,
        out,
        out_values,
        d_in,
        MAX_SEGMENT=csc.max_segment,
        **tiling.launch,
    )
    return out, out_values


def grad_weights(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    g: Float[Tensor, "batch d_in"],
    d_sae: int,
    csc: SegmentedCsc | None = None,
) -> Float[Tensor, "d_sae d_in"]:
    """Return for each latent the sum of `values_j g[row_j]` over its entries; `csc` if already sorted."""
    return grad_weights_and_bias(values, indices, offsets, g, d_sae, csc)[0]


def sum_by_latent(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    d_sae: int,
    csc: SegmentedCsc | None = None,
) -> Float[Tensor, " d_sae"]:
    """Return the sum of each latent's values, as the gradients of biases and thresholds need it."""
    nothing = values.new_zeros(1, 1).expand(len(offsets) - 1, 1)
    return grad_weights_and_bias(values, indices, offsets, nothing, d_sae, csc)[1]
