"""Rows as the kernels read them, each in one pass: an int8 store's gathered and dequantised, any store's normalised."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int8, Int64
from torch import Tensor


@triton.jit
def rows_kernel(
    stored_ptr,
    places_ptr,
    row_scale_ptr,
    mean_ptr,
    factor,
    max_norm,
    out_ptr,
    also_ptr,
    d_in,
    stride,
    QUANTISED: tl.constexpr,
    LIMITED: tl.constexpr,
    ALSO: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    mask = d < d_in
    if QUANTISED:
        source = tl.load(places_ptr + row).to(tl.int64)
        x = tl.load(stored_ptr + source * stride + d, mask=mask, other=0).to(tl.float32)
        x *= tl.load(row_scale_ptr + source)
    else:
        x = tl.load(stored_ptr + row * stride + d, mask=mask, other=0.0).to(tl.float32)
        x = (x - tl.load(mean_ptr + d, mask=mask, other=0.0)) * factor
        if LIMITED:
            squares = tl.zeros((D,), tl.float32)
            for start in range(0, d_in, D):  # every block of a wide row sums the whole row
                e = start + tl.arange(0, D)
                inside = e < d_in
                y = tl.load(stored_ptr + row * stride + e, mask=inside, other=0.0).to(tl.float32)
                y = (y - tl.load(mean_ptr + e, mask=inside, other=0.0)) * factor
                squares += y * y
            norm = tl.sqrt(tl.sum(squares, 0))
            x *= tl.where(norm > max_norm, max_norm / norm, 1.0)
    tl.store(out_ptr + row * d_in + d, x.to(out_ptr.dtype.element_ty), mask=mask)
    if ALSO:
        tl.store(also_ptr + row * d_in + d, x.to(also_ptr.dtype.element_ty), mask=mask)


def _launch(
    stored: Tensor,
    places: Tensor,
    row_scale: Tensor,
    mean: Tensor,
    factor: float,
    out: Tensor,
    also: Tensor | None,
    max_norm: float = math.inf,
) -> None:
    n_rows, d_in = out.shape
    assert stored.stride(1) == 1
    D = min(1024, max(128, triton.next_power_of_2(d_in)))
    if n_rows:
        rows_kernel[(n_rows, triton.cdiv(d_in, D))](
            stored,
            places,
            row_scale,
            mean,
            factor,
            max_norm,
            out,
            out if also is None else also,
            d_in,
            stored.stride(0),
            QUANTISED=stored.dtype == torch.int8,
            LIMITED=math.isfinite(max_norm),
            ALSO=also is not None,
            D=D,
            num_warps=4,
        )


def dequantise(
    values: Int8[Tensor, "rows d_in"],
    scales: Float32[Tensor, " rows"],
    places: Int64[Tensor, " batch"],
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "batch d_in"]:
    """Return rows `places` of `scales * values`, rounded as the store's reader rounds them."""
    out = torch.empty(len(places), values.shape[1], dtype=dtype, device=values.device)
    _launch(values, places, scales, scales, 1.0, out, None)
    return out


def normalise(
    rows: Float[Tensor, "batch d_in"],
    mean: Float[Tensor, " d_in"],
    factor: float,
    dtype: torch.dtype = torch.bfloat16,
    max_norm: float = math.inf,
) -> tuple[Float32[Tensor, "batch d_in"], Float[Tensor, "batch d_in"]]:
    """Return `(rows - mean) * factor`, shortened to at most `max_norm`, in float32 and in the `dtype` of products."""
    x = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    also = None if dtype == torch.float32 else torch.empty(rows.shape, dtype=dtype, device=rows.device)
    _launch(rows, mean, mean, mean, factor, x, also, max_norm)
    return x, x if also is None else also
