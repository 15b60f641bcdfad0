"""A stored batch as the kernels read it: dequantised, centred, scaled and in bfloat16, in one pass."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Shaped
from torch import Tensor


@triton.jit
def dequantise_kernel(
    stored_ptr,
    row_scale_ptr,
    channel_scale_ptr,
    mean_ptr,
    factor_ptr,
    out_ptr,
    d_in,
    stride,
    ROW_SCALE: tl.constexpr,
    CHANNEL_SCALE: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    mask = d < d_in
    x = tl.load(stored_ptr + row * stride + d, mask=mask, other=0).to(tl.float32)
    if ROW_SCALE:
        x *= tl.load(row_scale_ptr + row).to(tl.float32)
    if CHANNEL_SCALE:
        x *= tl.load(channel_scale_ptr + d, mask=mask, other=0.0).to(tl.float32)
    x = (x - tl.load(mean_ptr + d, mask=mask, other=0.0)) * tl.load(factor_ptr)
    tl.store(out_ptr + row * d_in + d, x.to(out_ptr.dtype.element_ty), mask=mask)


def dequantise(
    stored: Shaped[Tensor, "batch d_in"],
    mean: Float[Tensor, " d_in"],
    factor: Float[Tensor, ""],
    row_scale: Float[Tensor, " batch"] | None = None,
    channel_scale: Float[Tensor, " d_in"] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "batch d_in"]:
    """Return `(stored * scales - mean) * factor`; `stored` is int8 with scales, or any float type without."""
    n_rows, d_in = stored.shape
    assert stored.stride(1) == 1
    out = torch.empty(n_rows, d_in, dtype=dtype, device=stored.device)
    D = min(1024, triton.next_power_of_2(d_in))
    if n_rows:
        dequantise_kernel[(n_rows, triton.cdiv(d_in, D))](
            stored,
            row_scale if row_scale is not None else mean,
            channel_scale if channel_scale is not None else mean,
            mean,
            factor,
            out,
            d_in,
            stored.stride(0),
            ROW_SCALE=row_scale is not None,
            CHANNEL_SCALE=channel_scale is not None,
            D=D,
            num_warps=4,
        )
    return out
