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
from .tile import add_scaled, load_row, load_rows, row_tiling, store_row, sum_over_entries, zero_row, zero_rows


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
    WIDTHS: tl.constexpr,
):
    """Store `sum_j values_j matrix[row_j]` over a segment, and the values' own sum.

    The rows of three turns are asked for at once, into shared memory.
    """
    order_ptr += segment * MAX_SEGMENT
    rows_ptr += segment * MAX_SEGMENT
    total = zero_rows(ENTRIES, WIDTHS)
    values_total = tl.zeros([ENTRIES], tl.float32)
    for first in tl.range(0, MAX_SEGMENT, ENTRIES, num_stages=3):
        places = first + tl.arange(0, ENTRIES)
        inside = places < MAX_SEGMENT
        entry = tl.load(order_ptr + places, mask=inside, other=0)
        row = tl.load(rows_ptr + places, mask=inside, other=0).to(tl.int64)
        value = tl.load(values_ptr + entry, mask=inside, other=0.0).to(tl.float32)
        total = add_scaled(total, value[:, None], load_rows(matrix_ptr + row * stride, inside, d_in, WIDTHS))
        values_total += value
    store_row(partial_ptr + segment * d_in, sum_over_entries(total), d_in)
    tl.store(partial_values_ptr + segment, tl.sum(values_total, axis=0))


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
    WIDTHS: tl.constexpr,
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
            WIDTHS,
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
            WIDTHS,
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
    d_in,
    MAX_SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Return the sum over a latent's entries, those of its segments from the partial sums, and that of its values."""
    start = tl.load(starts_ptr + latent)
    length = (tl.load(starts_ptr + latent + 1) - start).to(tl.int32)
    first = tl.cdiv(start, MAX_SEGMENT)
    n_before = (first * MAX_SEGMENT - start).to(tl.int32)
    n_segments = tl.maximum(length - n_before, 0) // MAX_SEGMENT
    skipped = n_segments * MAX_SEGMENT
    n = length - skipped
    order_ptr += start
    rows_ptr += start
    total = zero_row(WIDTHS)
    values_total = 0.0
    # A thread adds the same channels of some entries that it asks for together, so that no sum crosses threads.
    for turn in range(0, n, ENTRIES):
        for number in tl.static_range(ENTRIES):
            place = turn + number
            inside = place < n
            place = tl.where(place < n_before, place, place + skipped)
            entry = tl.load(order_ptr + place, mask=inside, other=0)
            row = tl.load(rows_ptr + place, mask=inside, other=0).to(tl.int64)
            value = tl.load(values_ptr + entry, mask=inside, other=0.0).to(tl.float32)
            total = add_scaled(total, value, load_row(matrix_ptr + row * stride, tl.where(inside, d_in, 0), WIDTHS))
            values_total += value
    for segment in range(first, first + n_segments):
        total = add_scaled(total, 1.0, load_row(partial_ptr + segment * d_in, d_in, WIDTHS))
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
    WIDTHS: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
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
        d_in,
        MAX_SEGMENT,
        ENTRIES,
        WIDTHS,
    )
    store_row(out_ptr + latent * d_in, total, d_in)
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
