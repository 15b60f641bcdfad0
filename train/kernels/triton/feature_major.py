"""Gradients of the weights: one program a latent, over the entries sorted by latent. No atomics.

Of the runs of `MAX_SEGMENT` sorted entries that start at its multiples, those with a single latent, which is hot, are
summed by programs of their own into a buffer. The latent's program adds these partial sums, in their order, to its
other entries, fewer than two runs: two executions agree in every bit.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ..csc import SegmentedCsc
from .csc import to_csc
from .token_major import row_tiling


@triton.jit
def sum_entries(
    values_ptr,
    order_ptr,
    rows_ptr,
    matrix_ptr,
    stride,
    start,
    n,
    n_before,
    skipped,
    d,
    d_in,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return `sum_j values_j matrix[row_j]` over n sorted entries, and the values' own sum.

    The entries start at `start`; after the first `n_before`, `skipped` are left out. Only `start` needs 64 bits. Rows
    of so many turns are asked for at once, into shared memory if more than one.
    """
    order_ptr += start
    rows_ptr += start
    total = tl.zeros([ENTRIES, D], tl.float32)
    values_total = tl.zeros([ENTRIES], tl.float32)
    for first in tl.range(0, n, ENTRIES, num_stages=STAGES):
        places = first + tl.arange(0, ENTRIES)
        inside = places < n
        places = tl.where(places < n_before, places, places + skipped)
        entry = tl.load(order_ptr + places, mask=inside, other=0)
        row = tl.load(rows_ptr + places, mask=inside, other=0).to(tl.int64)
        value = tl.load(values_ptr + entry, mask=inside, other=0.0).to(tl.float32)
        mask = inside[:, None] & (d < d_in)[None, :]
        terms = tl.load(matrix_ptr + row[:, None] * stride + d[None, :], mask=mask, other=0.0)
        total += value[:, None] * terms.to(tl.float32)
        values_total += value
    return tl.sum(total, axis=0), tl.sum(values_total, axis=0)


@triton.jit
def store_segment(
    segment,
    values_ptr,
    order_ptr,
    rows_ptr,
    matrix_ptr,
    stride,
    partial_ptr,
    partial_values_ptr,
    d_in,
    MAX_SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    d = tl.arange(0, D)
    start = segment * MAX_SEGMENT
    total, values_total = sum_entries(
        values_ptr,
        order_ptr,
        rows_ptr,
        matrix_ptr,
        stride,
        start,
        MAX_SEGMENT,
        MAX_SEGMENT,
        0,
        d,
        d_in,
        ENTRIES,
        D,
        STAGES=3,
    )
    tl.store(partial_ptr + segment * d_in + d, total, mask=d < d_in)
    tl.store(partial_values_ptr + segment, values_total)


@triton.jit
def segments_kernel(
    order_ptr,
    rows_ptr,
    sorted_ptr,
    starts_ptr,
    d_sae,
    d_in,
    values_ptr,
    matrix_ptr,
    stride,
    partial_ptr,
    partial_values_ptr,
    also_values_ptr,
    also_matrix_ptr,
    also_stride,
    also_partial_ptr,
    also_partial_values_ptr,
    ALSO: tl.constexpr,
    MAX_SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    start = segment * MAX_SEGMENT
    stop = start + MAX_SEGMENT
    if stop > tl.load(starts_ptr + d_sae):
        return
    if tl.load(sorted_ptr + start) != tl.load(sorted_ptr + stop - 1):
        return
    if ALSO and tl.program_id(1) == 1:
        store_segment(
            segment,
            also_values_ptr,
            order_ptr,
            rows_ptr,
            also_matrix_ptr,
            also_stride,
            also_partial_ptr,
            also_partial_values_ptr,
            d_in,
            MAX_SEGMENT,
            ENTRIES,
            D,
        )
    else:
        store_segment(
            segment,
            values_ptr,
            order_ptr,
            rows_ptr,
            matrix_ptr,
            stride,
            partial_ptr,
            partial_values_ptr,
            d_in,
            MAX_SEGMENT,
            ENTRIES,
            D,
        )


@triton.jit
def sum_latent(
    latent,
    values_ptr,
    order_ptr,
    rows_ptr,
    matrix_ptr,
    stride,
    starts_ptr,
    partial_ptr,
    partial_values_ptr,
    d,
    d_in,
    MAX_SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    """Return the sum over a latent's entries, those of its segments from the partial sums, and that of its values."""
    start = tl.load(starts_ptr + latent)
    stop = tl.load(starts_ptr + latent + 1)
    first = tl.cdiv(start, MAX_SEGMENT)
    n_segments = tl.maximum(stop // MAX_SEGMENT - first, 0)
    skipped = (n_segments * MAX_SEGMENT).to(tl.int32)
    total, values_total = sum_entries(
        values_ptr,
        order_ptr,
        rows_ptr,
        matrix_ptr,
        stride,
        start,
        (stop - start).to(tl.int32) - skipped,
        (first * MAX_SEGMENT - start).to(tl.int32),
        skipped,
        d,
        d_in,
        ENTRIES,
        D,
        STAGES=1,
    )
    for segment in range(first, first + n_segments):
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


Partial = tuple[Float[Tensor, "n_segments d_in"], Float[Tensor, " n_segments"]]
"""Partial sums of hot latents; what is not a hot latent's segment is undefined."""


def sum_segments(
    csc: SegmentedCsc,
    values: Float[Tensor, " nnz"],
    matrix: Float[Tensor, "rows d_in"],
    also: tuple[Float[Tensor, " nnz"], Float[Tensor, "rows d_in"]] | None = None,
) -> tuple[Partial, Partial]:
    """Return the partial sums of values and matrix, and in the same launch those of `also` (without it, the same)."""
    capacity, d_in = max(1, len(csc.order) // csc.max_segment), matrix.shape[1]

    def buffers() -> Partial:
        rows = torch.empty(capacity, d_in, dtype=torch.float32, device=matrix.device)
        return rows, torch.empty(capacity, dtype=torch.float32, device=matrix.device)

    partial = buffers()
    also_partial = partial if also is None else buffers()
    also_values, also_matrix = also or (values, matrix)
    assert matrix.stride(1) == also_matrix.stride(1) == 1
    if len(csc.order) >= csc.max_segment:
        segments_kernel[(capacity, 1 if also is None else 2)](
            csc.order,
            csc.rows,
            csc.keys,
            csc.starts,
            len(csc.starts) - 1,
            d_in,
            values,
            matrix,
            matrix.stride(0),
            *partial,
            also_values,
            also_matrix,
            also_matrix.stride(0),
            *also_partial,
            ALSO=also is not None,
            MAX_SEGMENT=csc.max_segment,
            **row_tiling(d_in).launch,
        )
    return partial, also_partial


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
    partial, _ = sum_segments(csc, values, g)
    out = torch.empty(d_sae, d_in, dtype=torch.float32, device=g.device)
    out_values = torch.empty(d_sae, dtype=torch.float32, device=g.device)
    grad_weights_kernel[(d_sae,)](
        values,
        csc.order,
        csc.rows,
        g,
        g.stride(0),
        csc.starts,
        *partial,
        out,
        out_values,
        d_in,
        MAX_SEGMENT=csc.max_segment,
        **row_tiling(d_in).launch,
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
