"""The weights' gradients and their update in one kernel: no gradient of a weight reaches memory.

A program holds a latent's encoder and decoder rows: it sums their gradients, takes from the decoder's the
part along its row, applies Adam, restores the unit norm, and writes the rows and their bfloat16 shadows.
Per parameter that is 26 bytes: weight and two moments read and written, and the shadow.

Clipping by the exact global norm takes the kernel twice: once for each latent's squared norm alone.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..csc import SegmentedCsc
from ..fused_state import AdamState, DenseGradients, Hyperparameters
from .feature_major import sum_latent, sum_segments
from .token_major import row_tiling


@triton.jit
def adam(weight, mean, square, gradient, lr, correction1, correction2, keep1, keep2, new1, new2, eps):
    """Return the new weight and its new moments (arXiv 1412.6980; in PyTorch's order of operations)."""
    mean = mean * keep1 + gradient * new1
    square = square * keep2 + gradient * gradient * new2
    weight -= (lr / correction1) * mean / (tl.sqrt_rn(square) / tl.sqrt_rn(correction2) + eps)
    return weight, mean, square


@triton.jit
def update_kernel(
    acts_ptr,
    grad_pre_acts_ptr,
    order_ptr,
    rows_ptr,
    x_ptr,
    stride_x,
    g_ptr,
    stride_g,
    starts_ptr,
    partial_enc_ptr,
    partial_bias_ptr,
    partial_dec_ptr,
    partial_unused_ptr,
    W_enc_ptr,
    W_enc_mean_ptr,
    W_enc_square_ptr,
    W_enc_shadow_ptr,
    W_dec_ptr,
    W_dec_mean_ptr,
    W_dec_square_ptr,
    W_dec_shadow_ptr,
    b_enc_ptr,
    b_enc_mean_ptr,
    b_enc_square_ptr,
    squared_norm_ptr,
    centre_ptr,
    schedule_ptr,
    slots_ptr,
    dense_enc_ptr,
    dense_dec_ptr,
    dense_bias_ptr,
    keep1,
    keep2,
    new1,
    new2,
    eps,
    d_in,
    NORM_ONLY: tl.constexpr,
    DENSE: tl.constexpr,
    MAX_SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    mask = d < d_in
    at = latent * d_in + d
    # A load waits for earlier stores, which may be to the same memory. So the update's loads are issued first; they
    # arrive while gradients are summed.
    W_dec = tl.load(W_dec_ptr + at, mask=mask, other=0.0)
    if not NORM_ONLY:
        W_dec_mean = tl.load(W_dec_mean_ptr + at, mask=mask, other=0.0)
        W_dec_square = tl.load(W_dec_square_ptr + at, mask=mask, other=0.0)
        W_enc = tl.load(W_enc_ptr + at, mask=mask, other=0.0)
        W_enc_mean = tl.load(W_enc_mean_ptr + at, mask=mask, other=0.0)
        W_enc_square = tl.load(W_enc_square_ptr + at, mask=mask, other=0.0)
        b_enc = tl.load(b_enc_ptr + latent)
        b_enc_mean = tl.load(b_enc_mean_ptr + latent)
        b_enc_square = tl.load(b_enc_square_ptr + latent)
        lr = tl.load(schedule_ptr)
        correction1 = tl.load(schedule_ptr + 1)
        correction2 = tl.load(schedule_ptr + 2)
        clip = tl.load(schedule_ptr + 3)
    grad_dec, _ = sum_latent(
        latent,
        acts_ptr,
        order_ptr,
        rows_ptr,
        g_ptr,
        stride_g,
        starts_ptr,
        partial_dec_ptr,
        partial_unused_ptr,
        d,
        d_in,
        MAX_SEGMENT,
        ENTRIES,
        D,
    )
    if DENSE:
        slot = tl.load(slots_ptr + latent).to(tl.int64)
        dense_at = slot * d_in + d
        in_slot = mask & (dense_at >= 0)
        grad_dec += tl.load(dense_dec_ptr + dense_at, mask=in_slot, other=0.0)
    along = tl.sum(grad_dec * W_dec, axis=0) / tl.maximum(tl.sum(W_dec * W_dec, axis=0), 1e-30)
    grad_dec -= along * W_dec
    grad_enc, grad_bias = sum_latent(
        latent,
        grad_pre_acts_ptr,
        order_ptr,
        rows_ptr,
        x_ptr,
        stride_x,
        starts_ptr,
        partial_enc_ptr,
        partial_bias_ptr,
        d,
        d_in,
        MAX_SEGMENT,
        ENTRIES,
        D,
    )
    if DENSE:
        grad_enc += tl.load(dense_enc_ptr + dense_at, mask=in_slot, other=0.0)
        grad_bias += tl.load(dense_bias_ptr + slot, mask=slot >= 0, other=0.0)
    # The encoder read x - centre.
    grad_enc -= grad_bias * tl.load(centre_ptr + d, mask=mask, other=0.0)
    if NORM_ONLY:
        squares = tl.sum(grad_enc * grad_enc, axis=0) + tl.sum(grad_dec * grad_dec, axis=0)
        tl.store(squared_norm_ptr + latent, squares + grad_bias * grad_bias)
    else:
        W_dec, W_dec_mean, W_dec_square = adam(
            W_dec,
            W_dec_mean,
            W_dec_square,
            grad_dec * clip,
            lr,
            correction1,
            correction2,
            keep1,
            keep2,
            new1,
            new2,
            eps,
        )
        W_enc, W_enc_mean, W_enc_square = adam(
            W_enc,
            W_enc_mean,
            W_enc_square,
            grad_enc * clip,
            lr,
            correction1,
            correction2,
            keep1,
            keep2,
            new1,
            new2,
            eps,
        )
        b_enc, b_enc_mean, b_enc_square = adam(
            b_enc,
            b_enc_mean,
            b_enc_square,
            grad_bias * clip,
            lr,
            correction1,
            correction2,
            keep1,
            keep2,
            new1,
            new2,
            eps,
        )
        squared = tl.sum(tl.where(mask, W_dec * W_dec, 0.0), axis=0)
        W_dec = W_dec / tl.maximum(tl.sqrt_rn(squared), 1e-15)
        tl.store(W_dec_mean_ptr + at, W_dec_mean, mask=mask)
        tl.store(W_dec_square_ptr + at, W_dec_square, mask=mask)
        tl.store(W_dec_ptr + at, W_dec, mask=mask)
        tl.store(W_dec_shadow_ptr + at, W_dec.to(W_dec_shadow_ptr.dtype.element_ty), mask=mask)
        tl.store(W_enc_mean_ptr + at, W_enc_mean, mask=mask)
        tl.store(W_enc_square_ptr + at, W_enc_square, mask=mask)
        tl.store(W_enc_ptr + at, W_enc, mask=mask)
        tl.store(W_enc_shadow_ptr + at, W_enc.to(W_enc_shadow_ptr.dtype.element_ty), mask=mask)
        tl.store(b_enc_mean_ptr + latent, b_enc_mean)
        tl.store(b_enc_square_ptr + latent, b_enc_square)
        tl.store(b_enc_ptr + latent, b_enc)


def update(
    acts: Float[Tensor, " nnz"],
    grad_pre_acts: Float[Tensor, " nnz"],
    csc: SegmentedCsc,
    x: Float[Tensor, "batch d_in"],
    g: Float[Tensor, "batch d_in"],
    W_enc: AdamState,
    b_enc: AdamState,
    W_dec: AdamState,
    hyperparameters: Hyperparameters,
    centre: Float[Tensor, " d_in"],
    max_norm: float | None = None,
    other_squared_norm: Float[Tensor, ""] | None = None,
    dense: DenseGradients | None = None,
    over_latents: Callable[[Tensor], Tensor] = lambda total: total,
) -> Tensor | None:
    """Update the encoder and the decoder, in place, from a step's sparse entries; return the norm if it is clipped.

    The pre-activations were `W_enc (x - centre) + b_enc`; `centre` is `b_dec`, or zeros. `dense` gradients are added
    to those of the entries. With `max_norm`, gradients (the decoder's projected) are scaled so that their global norm,
    `other_squared_norm` of the parameters updated elsewhere included, is at most that, and
    `schedule[3]` holds the coefficient for those. `over_latents` adds those of latents on other ranks.
    """
    d_sae, d_in = W_enc.weight.shape
    tiling = row_tiling(d_in)
    partial_enc, partial_dec = sum_segments(csc, grad_pre_acts, x, also=(acts, g))
    squared_norm = torch.empty(d_sae if max_norm is not None else 1, dtype=torch.float32, device=x.device)
    h = hyperparameters

    def run(norm_only: bool) -> None:
        update_kernel[(d_sae,)](
            acts,
            grad_pre_acts,
            csc.order,
            csc.rows,
            x,
            x.stride(0),
            g,
            g.stride(0),
            csc.starts,
            *partial_enc,
            *partial_dec,
            W_enc.weight,
            W_enc.mean,
            W_enc.square,
            W_enc.shadow,
            W_dec.weight,
            W_dec.mean,
            W_dec.square,
            W_dec.shadow,
            b_enc.weight,
            b_enc.mean,
            b_enc.square,
            squared_norm,
            centre,
            h.schedule,
            *(dense or (csc.rows, W_enc.weight, W_dec.weight, b_enc.weight)),
            h.beta1,
            h.beta2,
            1 - h.beta1,
            1 - h.beta2,
            h.eps,
            d_in,
            NORM_ONLY=norm_only,
            DENSE=dense is not None,
            MAX_SEGMENT=csc.max_segment,
            **tiling.launch,
        )

    norm = None
    if max_norm is not None:
        run(norm_only=True)
        total = over_latents(squared_norm.double().sum())
        if other_squared_norm is not None:
            total = total + other_squared_norm
        norm = total.sqrt()
        h.schedule[3].copy_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    run(norm_only=False)
    return norm
