"""Decode, the loss and the gradient of the values: one program a token, one pass over its decoder rows.

A token's whole row of `d_in` stays in registers: the chosen decoder rows are summed, the loss and its
gradient `g` formed, and the same decoder rows, still in the cache, are multiplied with `g`.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor


class RowTiling(NamedTuple):
    """How a program holds rows of `d_in`: how many at once, and over how many warps."""

    entries: int
    d: int
    num_warps: int

    @property
    def launch(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {"ENTRIES": self.entries, "D": self.d, "num_warps": self.num_warps}


def row_tiling(d_in: int) -> RowTiling:
    """Choose to hold the whole row, and as many rows at a time as fit in registers without spilling."""
    # With fewer elements than threads, threads that share one could read what another has already written.
    d = max(128, triton.next_power_of_2(d_in))
    num_warps = 4 if d <= 1024 else 8 if d <= 8192 else 16
    entries = max(1, min(16, num_warps * 1024 // d))
    return RowTiling(entries, d, num_warps)


@triton.jit
def decode_row(values_ptr, indices_ptr, start, stop, W_ptr, stride_W, d, d_in, ENTRIES: tl.constexpr, D: tl.constexpr):
    """Return `sum_j values_j W[indices_j]` over a row's entries."""
    # Terms are added across entries once, at the end: that crosses warps.
    x_hat = tl.zeros([ENTRIES, D], tl.float32)
    for first in range(start, stop, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        value = tl.load(values_ptr + entries, mask=entries < stop, other=0.0).to(tl.float32)
        latent = tl.load(indices_ptr + entries, mask=entries < stop, other=0).to(tl.int64)
        mask = (entries < stop)[:, None] & (d < d_in)[None, :]
        W = tl.load(W_ptr + latent[:, None] * stride_W + d[None, :], mask=mask, other=0.0)
        x_hat += value[:, None] * W.to(tl.float32)
    return tl.sum(x_hat, axis=0)


@triton.jit
def store_grad_values(
    g,
    values_ptr,
    indices_ptr,
    out_ptr,
    start,
    stop,
    W_ptr,
    stride_W,
    d,
    d_in,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
    RELU: tl.constexpr,
):
    """Store `g . W[indices_j]` for a row's entries; with RELU, 0 where the value is, and return how many are not."""
    n_active = 0
    for first in range(start, stop, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        latent = tl.load(indices_ptr + entries, mask=entries < stop, other=0).to(tl.int64)
        mask = (entries < stop)[:, None] & (d < d_in)[None, :]
        W = tl.load(W_ptr + latent[:, None] * stride_W + d[None, :], mask=mask, other=0.0)
        dots = tl.sum(g[None, :] * W.to(tl.float32), axis=1)
        if RELU:
            value = tl.load(values_ptr + entries, mask=entries < stop, other=0.0)
            dots = tl.where(value > 0, dots, 0.0)
            n_active += tl.sum((value > 0).to(tl.int32), axis=0)
        tl.store(out_ptr + entries, dots, mask=entries < stop)
    return n_active


@triton.jit
def decode_kernel(
    values_ptr,
    indices_ptr,
    offsets_ptr,
    W_ptr,
    x_hat_ptr,
    capacity,
    d_in,
    stride_W,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    start = tl.minimum(tl.load(offsets_ptr + row).to(tl.int64), capacity)
    stop = tl.minimum(tl.load(offsets_ptr + row + 1).to(tl.int64), capacity)
    x_hat = decode_row(values_ptr, indices_ptr, start, stop, W_ptr, stride_W, d, d_in, ENTRIES, D)
    tl.store(x_hat_ptr + row * d_in + d, x_hat, mask=d < d_in)


@triton.jit
def grad_values_kernel(
    g_ptr,
    W_ptr,
    indices_ptr,
    offsets_ptr,
    out_ptr,
    capacity,
    d_in,
    stride_g,
    stride_W,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    start = tl.minimum(tl.load(offsets_ptr + row).to(tl.int64), capacity)
    stop = tl.minimum(tl.load(offsets_ptr + row + 1).to(tl.int64), capacity)
    g = tl.load(g_ptr + row * stride_g + d, mask=d < d_in, other=0.0).to(tl.float32)
    store_grad_values(
        g, indices_ptr, indices_ptr, out_ptr, start, stop, W_ptr, stride_W, d, d_in, ENTRIES, D, RELU=False
    )


@triton.jit
def reconstruct_kernel(
    values_ptr,
    indices_ptr,
    offsets_ptr,
    W_ptr,
    b_ptr,
    target_ptr,
    loss_ptr,
    g_ptr,
    grad_values_ptr,
    n_active_ptr,
    scale,
    capacity,
    d_in,
    stride_W,
    stride_target,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    start = tl.minimum(tl.load(offsets_ptr + row).to(tl.int64), capacity)
    stop = tl.minimum(tl.load(offsets_ptr + row + 1).to(tl.int64), capacity)
    x_hat = decode_row(values_ptr, indices_ptr, start, stop, W_ptr, stride_W, d, d_in, ENTRIES, D)
    x_hat += tl.load(b_ptr + d, mask=d < d_in, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + row * stride_target + d, mask=d < d_in, other=0.0).to(tl.float32)
    residual = tl.where(d < d_in, x_hat - target, 0.0)
    tl.store(loss_ptr + row, tl.sum(residual * residual, axis=0))
    g = residual * scale
    tl.store(g_ptr + row * d_in + d, g, mask=d < d_in)
    n_active = store_grad_values(
        g, values_ptr, indices_ptr, grad_values_ptr, start, stop, W_ptr, stride_W, d, d_in, ENTRIES, D, RELU=True
    )
    tl.store(n_active_ptr + row, n_active)


@triton.jit
def auxk_residual_kernel(
    e_hat_ptr,
    g_ptr,
    total_ptr,
    squared_error_ptr,
    out_ptr,
    scale,
    coefficient,
    d_in,
    D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    mask = d < d_in
    difference = tl.load(e_hat_ptr + row * d_in + d, mask=mask, other=0.0).to(tl.float32)
    difference += tl.load(g_ptr + row * d_in + d, mask=mask, other=0.0) / scale
    tl.store(squared_error_ptr + row, tl.sum(difference * difference, axis=0))
    total = tl.load(total_ptr)
    weight = tl.where(total > 0, 2 * coefficient / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(out_ptr + row * d_in + d, (difference * weight).to(out_ptr.dtype.element_ty), mask=mask)


class Reconstruction(NamedTuple):
    """The results of a step for each token."""

    squared_error: Float[Tensor, " batch"]
    g: Float[Tensor, "batch d_in"]
    grad_pre_acts: Float[Tensor, " nnz"]
    n_active: Int32[Tensor, " batch"]


def reconstruct(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "batch d_in"],
    scale: float,
) -> Reconstruction:
    """Return each token's squared error, `g = scale * (x_hat - target)`, and `g . W_dec[i]` where a value is positive.

    With `scale = 2 / batch` the latter two are the gradients of the batch's mean squared error. Count the positive
    values of each token.
    """
    n_rows, d_in = target.shape
    assert W_dec.stride(1) == target.stride(1) == 1
    tiling = row_tiling(d_in)
    squared_error = torch.empty(n_rows, dtype=torch.float32, device=target.device)
    g = torch.empty(n_rows, d_in, dtype=torch.float32, device=target.device)
    grad_pre_acts = torch.empty(len(values), dtype=torch.float32, device=target.device)
    n_active = torch.empty(n_rows, dtype=torch.int32, device=target.device)
    if n_rows:
        reconstruct_kernel[(n_rows,)](
            values,
            indices,
            offsets,
            W_dec,
            b_dec,
            target,
            squared_error,
            g,
            grad_pre_acts,
            n_active,
            scale,
            len(values),
            d_in,
            W_dec.stride(0),
            target.stride(0),
            **tiling.launch,
        )
    return Reconstruction(squared_error, g, grad_pre_acts, n_active)


def decode(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    W_dec: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "batch d_in"]:
    """Return `sum_j values_j W_dec[indices_j]` for each row."""
    n_rows, d_in = len(offsets) - 1, W_dec.shape[1]
    assert W_dec.stride(1) == 1
    tiling = row_tiling(d_in)
    x_hat = torch.empty(n_rows, d_in, dtype=torch.float32, device=W_dec.device)
    if n_rows:
        decode_kernel[(n_rows,)](
            values,
            indices,
            offsets,
            W_dec,
            x_hat,
            len(values),
            d_in,
            W_dec.stride(0),
            **tiling.launch,
        )
    return x_hat


def grad_values(
    g: Float[Tensor, "batch d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
) -> Float[Tensor, " nnz"]:
    """Return `g[row_j] . W_dec[indices_j]` for each entry."""
    n_rows, d_in = g.shape
    assert W_dec.stride(1) == g.stride(1) == 1
    tiling = row_tiling(d_in)
    out = torch.empty(len(indices), dtype=torch.float32, device=g.device)
    if n_rows:
        grad_values_kernel[(n_rows,)](
            g,
            W_dec,
            indices,
            offsets,
            out,
            len(indices),
            d_in,
            g.stride(0),
            W_dec.stride(0),
            **tiling.launch,
        )
    return out


def auxk_residual(
    e_hat: Float[Tensor, "rows d_in"],
    g: Float[Tensor, "rows d_in"],
    scale: float,
    total: Float[Tensor, ""],
    coefficient: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows d_in"]]:
    """Return each row's squared error of `e_hat` and, in `dtype`, the gradient of AuxK's loss with respect to it.

    `g / scale` is `x_hat - x`, whose squares over the whole batch sum to `total`. The loss is `coefficient` times the
    rows' squared errors relative to that, or 0 if it is 0.
    """
    n_rows, d_in = g.shape
    assert e_hat.is_contiguous()
    assert g.is_contiguous()
    tiling = row_tiling(d_in)
    squared_error = torch.empty(n_rows, dtype=torch.float32, device=g.device)
    out = torch.empty(n_rows, d_in, dtype=dtype, device=g.device)
    auxk_residual_kernel[(n_rows,)](
        e_hat, g, total, squared_error, out, scale, coefficient, d_in, D=tiling.d, num_warps=tiling.num_warps
    )
    return squared_error, out
