"""Decode, the loss and the gradient of the values: one program a token.

`reconstruct` takes some channels of all of a token's decoder rows at a time: it sums them, forms the loss and its
gradient `g` of these channels, and multiplies the same elements with `g`. Each element of a decoder row is read once;
those of the next channels are then on their way to shared memory.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor

from .tile import add_scaled, dot, dots, load_row, load_rows, row_tiling, scaled, store_row, zero_row

MAX_AT_ONCE = 256
"""The most entries of a row that `reconstruct` takes at once; it takes more in two passes."""
_TILE, _BYTES_AHEAD = 4096, 32 << 10


class TokenTiling(NamedTuple):
    """How a program of `reconstruct` holds some channels of all decoder rows of a token, and how many it asks for."""

    k: int
    channels: int
    stages: int
    num_warps: int

    @property
    def launch(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {"K": self.k, "BLOCK_D": self.channels, "STAGES": self.stages, "num_warps": self.num_warps}


def token_tiling(k: int, d_in: int, itemsize: int) -> TokenTiling:
    """Choose 32 elements for a thread, of 128 channels where `k` allows, and 32 KiB to be under way."""
    padded = triton.next_power_of_2(k)
    num_warps = min(16, max(4, padded // 8))
    channels = min(_TILE * num_warps // 4 // padded, max(128, triton.next_power_of_2(d_in)))
    ahead = _BYTES_AHEAD // (padded * channels * itemsize)
    return TokenTiling(padded, channels, 1 + min(3, max(1, ahead)), num_warps)


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
    WIDTHS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.minimum(tl.load(offsets_ptr + row).to(tl.int64), capacity)
    stop = tl.minimum(tl.load(offsets_ptr + row + 1).to(tl.int64), capacity)
    values_ptr += start
    indices_ptr += start
    n = (stop - start).to(tl.int32)
    x_hat = zero_row(WIDTHS)
    for first in range(0, n, ENTRIES):
        for number in tl.static_range(ENTRIES):
            inside = first + number < n
            value = tl.load(values_ptr + first + number, mask=inside, other=0.0).to(tl.float32)
            latent = tl.load(indices_ptr + first + number, mask=inside, other=0).to(tl.int64)
            x_hat = add_scaled(x_hat, value, load_row(W_ptr + latent * stride_W, tl.where(inside, d_in, 0), WIDTHS))
    store_row(x_hat_ptr + row * d_in, x_hat, d_in)


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
    WIDTHS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.minimum(tl.load(offsets_ptr + row).to(tl.int64), capacity)
    stop = tl.minimum(tl.load(offsets_ptr + row + 1).to(tl.int64), capacity)
    g = load_row(g_ptr + row * stride_g, d_in, WIDTHS)
    for first in range(start, stop, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        latent = tl.load(indices_ptr + entries, mask=entries < stop, other=0).to(tl.int64)
        W = load_rows(W_ptr + latent * stride_W, entries < stop, d_in, WIDTHS)
        tl.store(out_ptr + entries, dots(W, g), mask=entries < stop)


@triton.jit
def reconstruct_kernel(
    values_ptr,
    indices_ptr,
    W_ptr,
    b_ptr,
    target_ptr,
    loss_ptr,
    g_ptr,
    grad_values_ptr,
    n_active_ptr,
    scale,
    k,
    d_in,
    stride_W,
    stride_target,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, K)
    inside = entries < k
    value = tl.load(values_ptr + row * k + entries, mask=inside, other=0.0)
    latent = tl.load(indices_ptr + row * k + entries, mask=inside, other=0).to(tl.int64)
    W_rows = W_ptr + latent[:, None] * stride_W
    squares = tl.zeros([BLOCK_D], tl.float32)
    # Products are added over channels once, at the end: that crosses threads.
    products = tl.zeros([K, BLOCK_D], tl.float32)
    for start in tl.range(0, d_in, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < d_in
        W = tl.load(W_rows + d[None, :], mask=inside[:, None] & mask[None, :], other=0.0).to(tl.float32)
        x_hat = tl.sum(value[:, None] * W, axis=0) + tl.load(b_ptr + d, mask=mask, other=0.0)
        target = tl.load(target_ptr + row * stride_target + d, mask=mask, other=0.0).to(tl.float32)
        residual = tl.where(mask, x_hat - target, 0.0)
        squares += residual * residual
        g = residual * scale
        tl.store(g_ptr + row * d_in + d, g, mask=mask)
        products += g[None, :] * W
    tl.store(loss_ptr + row, tl.sum(squares, axis=0))
    active = value > 0
    tl.store(grad_values_ptr + row * k + entries, tl.where(active, tl.sum(products, axis=1), 0.0), mask=inside)
    tl.store(n_active_ptr + row, tl.sum(active.to(tl.int32), axis=0))


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
    WIDTHS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    error = load_row(g_ptr + row * d_in, d_in, WIDTHS)
    difference = add_scaled(load_row(e_hat_ptr + row * d_in, d_in, WIDTHS), 1 / scale, error)
    tl.store(squared_error_ptr + row, dot(difference, difference))
    total = tl.load(total_ptr)
    weight = tl.where(total > 0, 2 * coefficient / tl.where(total > 0, total, 1.0), 0.0)
    store_row(out_ptr + row * d_in, scaled(difference, weight), d_in)


class Reconstruction(NamedTuple):
    """The results of a step for each token."""

    squared_error: Float[Tensor, " batch"]
    g: Float[Tensor, "batch d_in"]
    grad_pre_acts: Float[Tensor, " nnz"]
    n_active: Int32[Tensor, " batch"]


def reconstruct(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "batch d_in"],
    scale: float,
) -> Reconstruction:
    """Return each token's squared error, `g = scale * (x_hat - target)`, and `g . W_dec[i]` where a value is positive.

    Each token has `nnz / batch` entries. With `scale = 2 / batch` the latter two are the gradients of the batch's mean
    squared error. Count the positive values of each token.
    """
    n_rows, d_in = target.shape
    k = len(values) // max(1, n_rows)
    assert k * n_rows == len(values)
    assert W_dec.stride(1) == target.stride(1) == 1
    if k > MAX_AT_ONCE:
        offsets = torch.arange(0, len(values) + 1, k, device=target.device)
        error = decode(values, indices, offsets, W_dec).add_(b_dec).sub_(target)
        squared_error, g, active = error.square().sum(1), error.mul_(scale), values > 0
        grad_pre_acts = grad_values(g, W_dec, indices, offsets).mul_(active)
        return Reconstruction(squared_error, g, grad_pre_acts, active.view(n_rows, k).sum(1, dtype=torch.int32))
    squared_error = torch.empty(n_rows, dtype=torch.float32, device=target.device)
    g = torch.empty(n_rows, d_in, dtype=torch.float32, device=target.device)
    grad_pre_acts = torch.empty(len(values), dtype=torch.float32, device=target.device)
    n_active = torch.empty(n_rows, dtype=torch.int32, device=target.device)
    if n_rows:
        reconstruct_kernel[(n_rows,)](
            values,
            indices,
            W_dec,
            b_dec,
            target,
            squared_error,
            g,
            grad_pre_acts,
            n_active,
            scale,
            k,
            d_in,
            W_dec.stride(0),
            target.stride(0),
            **token_tiling(k, d_in, W_dec.itemsize).launch,
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
        e_hat, g, total, squared_error, out, scale, coefficient, d_in, WIDTHS=tiling.widths, num_warps=tiling.num_warps
    )
    return squared_error, out
