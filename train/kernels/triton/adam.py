"""The weights' gradients and their update in one kernel: no gradient of a weight reaches memory.

A program takes a group of latents in turn. It holds a latent's encoder and decoder rows: it sums their gradients, takes
from the decoder's the part along its row, applies Adam, restores the unit norm, and writes the rows and their bfloat16
shadows. Per parameter that is 26 bytes: weight and two moments read and written, and the shadow. The same pass counts
for how long each latent has not fired, and adds up what `b_dec` gets through the encoder, a row for each group.

Clipping by the exact global norm takes the kernel twice: once for the squared norms alone.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float64
from torch import Tensor

from ..across import Across
from ..csc import SegmentedCsc
from ..fused_state import GROUP, AdamState, DenseGradients, Hyperparameters, LatentCounters
from .feature_major import sum_latent, sum_segments
from .step_ends import adam, clip_gradients, update_b_dec
from .tile import add_scaled, dot, load_row, row_tiling, scaled, store_row, zero_row

UPDATE_REGISTERS = 128
"""Registers a thread of `update` may have: of programs of 4 warps four then share an SM, of 8 warps two."""


@triton.jit
def adam_of_row(
    weight,
    mean,
    square,
    gradient,
    clip_by,
    lr,
    correction1,
    correction2,
    keep1,
    keep2,
    new1,
    new2,
    eps,
):
    """Return a row of weights after Adam's step along its gradient times `clip_by`, and its moments."""
    weights = ()
    means = ()
    squares = ()
    for part in tl.static_range(len(weight)):
        stepped = adam(
            weight[part],
            mean[part],
            square[part],
            gradient[part] * clip_by,
            lr,
            correction1,
            correction2,
            keep1,
            keep2,
            new1,
            new2,
            eps,
        )
        weights += (stepped[0],)
        means += (stepped[1],)
        squares += (stepped[2],)
    return weights, means, squares


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
    partial_acts_ptr,
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
    b_dec_ptr,
    tokens_since_fired_ptr,
    squares_ptr,
    by_bias_ptr,
    n_dead_ptr,
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
    decoder_lr_scale,
    n_rows,
    dead_after_tokens,
    d_sae,
    d_in,
    NORM_ONLY: tl.constexpr,
    SUM_BIAS: tl.constexpr,
    DENSE: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_SEGMENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    is_encoder = tl.program_id(1)
    first, stop = group * GROUP, tl.minimum((group + 1) * GROUP, d_sae)
    squares = 0.0
    if not NORM_ONLY:
        lr = tl.load(schedule_ptr)
        correction1 = tl.load(schedule_ptr + 1)
        correction2 = tl.load(schedule_ptr + 2)
        clip_by = tl.load(schedule_ptr + 3)
    # A row and its moments are asked for first, and arrive while its gradient is summed.
    if is_encoder == 0:
        if not NORM_ONLY:
            lr *= decoder_lr_scale
        n_dead = 0
        for latent in range(first, stop):
            at = latent * d_in
            W = load_row(W_dec_ptr + at, d_in, WIDTHS)
            if not NORM_ONLY:
                mean = load_row(W_dec_mean_ptr + at, d_in, WIDTHS)
                square = load_row(W_dec_square_ptr + at, d_in, WIDTHS)
                since = tl.load(tokens_since_fired_ptr + latent)
            gradient, total_acts = sum_latent(
                latent,
                acts_ptr,
                order_ptr,
                rows_ptr,
                g_ptr,
                stride_g,
                starts_ptr,
                partial_dec_ptr,
                partial_acts_ptr,
                d_in,
                MAX_SEGMENT,
                ENTRIES,
                WIDTHS,
            )
            if DENSE:
                slot = tl.load(slots_ptr + latent).to(tl.int64)
                dense = load_row(dense_dec_ptr + slot * d_in, tl.where(slot >= 0, d_in, 0), WIDTHS)
                gradient = add_scaled(gradient, 1.0, dense)
            along = dot(gradient, W) / tl.maximum(dot(W, W), 1e-30)
            gradient = add_scaled(gradient, -along, W)
            if NORM_ONLY:
                squares += dot(gradient, gradient)
            else:
                W, mean, square = adam_of_row(
                    W, mean, square, gradient, clip_by, lr, correction1, correction2, keep1, keep2, new1, new2, eps
                )
                # What is past the row is zero before and after.
                W = scaled(W, 1.0 / tl.maximum(tl.sqrt_rn(dot(W, W)), 1e-15))
                store_row(W_dec_mean_ptr + at, mean, d_in)
                store_row(W_dec_square_ptr + at, square, d_in)
                store_row(W_dec_ptr + at, W, d_in)
                store_row(W_dec_shadow_ptr + at, W, d_in)
                # Activations are not negative, so their sum is positive if and only if one of them is.
                tl.store(tokens_since_fired_ptr + latent, tl.where(total_acts > 0, 0, since + n_rows))
                n_dead += (since >= dead_after_tokens).to(tl.int32)
        if not NORM_ONLY:
            tl.store(n_dead_ptr + group, n_dead)
    else:
        by_bias = zero_row(WIDTHS)
        for latent in range(first, stop):
            at = latent * d_in
            if SUM_BIAS or not NORM_ONLY:
                W = load_row(W_enc_ptr + at, d_in, WIDTHS)
            if not NORM_ONLY:
                mean = load_row(W_enc_mean_ptr + at, d_in, WIDTHS)
                square = load_row(W_enc_square_ptr + at, d_in, WIDTHS)
                b_enc = tl.load(b_enc_ptr + latent)
                b_enc_mean = tl.load(b_enc_mean_ptr + latent)
                b_enc_square = tl.load(b_enc_square_ptr + latent)
            gradient, grad_bias = sum_latent(
                latent,
                grad_pre_acts_ptr,
                order_ptr,
                rows_ptr,
                x_ptr,
                stride_x,
                starts_ptr,
                partial_enc_ptr,
                partial_bias_ptr,
                d_in,
                MAX_SEGMENT,
                ENTRIES,
                WIDTHS,
            )
            if DENSE:
                slot = tl.load(slots_ptr + latent).to(tl.int64)
                dense = load_row(dense_enc_ptr + slot * d_in, tl.where(slot >= 0, d_in, 0), WIDTHS)
                gradient = add_scaled(gradient, 1.0, dense)
                grad_bias += tl.load(dense_bias_ptr + slot, mask=slot >= 0, other=0.0)
            # The encoder read x - b_dec.
            gradient = add_scaled(gradient, -grad_bias, load_row(b_dec_ptr, d_in, WIDTHS))
            if SUM_BIAS:
                by_bias = add_scaled(by_bias, grad_bias, W)
            if NORM_ONLY:
                squares += dot(gradient, gradient) + grad_bias * grad_bias
            else:
                W, mean, square = adam_of_row(
                    W, mean, square, gradient, clip_by, lr, correction1, correction2, keep1, keep2, new1, new2, eps
                )
                b_enc, b_enc_mean, b_enc_square = adam(
                    b_enc,
                    b_enc_mean,
                    b_enc_square,
                    grad_bias * clip_by,
                    lr,
                    correction1,
                    correction2,
                    keep1,
                    keep2,
                    new1,
                    new2,
                    eps,
                )
                store_row(W_enc_mean_ptr + at, mean, d_in)
                store_row(W_enc_square_ptr + at, square, d_in)
                store_row(W_enc_ptr + at, W, d_in)
                store_row(W_enc_shadow_ptr + at, W, d_in)
                tl.store(b_enc_mean_ptr + latent, b_enc_mean)
                tl.store(b_enc_square_ptr + latent, b_enc_square)
                tl.store(b_enc_ptr + latent, b_enc)
        if SUM_BIAS:
            store_row(by_bias_ptr + group * d_in, by_bias, d_in)
    if NORM_ONLY:
        tl.store(squares_ptr + 2 * group + is_encoder, squares)


def update(
    acts: Float[Tensor, " nnz"],
    grad_pre_acts: Float[Tensor, " nnz"],
    csc: SegmentedCsc,
    x: Float[Tensor, "batch d_in"],
    g: Float[Tensor, "batch d_in"],
    W_enc: AdamState,
    b_enc: AdamState,
    W_dec: AdamState,
    b_dec: AdamState,
    hyperparameters: Hyperparameters,
    counters: LatentCounters,
    max_norm: float | None = None,
    dense: DenseGradients | None = None,
    across: Across | None = None,
) -> Float64[Tensor, ""] | None:
    """Update all parameters and the counters, in place, from a step's sparse entries; return the norm if it is clipped.

    The pre-activations were `W_enc (x - b_dec) + b_enc`, and `g` is the gradient of the reconstructions. `dense`
    gradients are added to those of the entries. With `max_norm`, gradients (the decoder's projected) are scaled so that
    their global norm is at most that, and `schedule[3]` holds the coefficient. Sums over latents are `across` ranks.
    """
    across = across or Across()
    d_sae, d_in = W_enc.weight.shape
    tiling = row_tiling(d_in)
    partial_enc, partial_dec = sum_segments(csc, grad_pre_acts, x, also=(acts, g))
    n_groups = triton.cdiv(d_sae, GROUP)
    clipped = max_norm is not None
    squares = torch.empty(2 * n_groups if clipped else 1, dtype=torch.float32, device=x.device)
    by_biases = torch.empty(n_groups, d_in, dtype=torch.float32, device=x.device)
    n_dead = torch.empty(n_groups, dtype=torch.int32, device=x.device)
    h = hyperparameters

    def run(norm_only: bool) -> None:
        update_kernel[(n_groups, 2)](
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
            b_dec.weight,
            counters.tokens_since_fired,
            squares,
            by_biases,
            n_dead,
            h.schedule,
            *(dense or (csc.rows, W_enc.weight, W_dec.weight, b_enc.weight)),
            h.beta1,
            h.beta2,
            1 - h.beta1,
            1 - h.beta2,
            h.eps,
            h.decoder_lr_scale,
            len(x),
            counters.dead_after_tokens,
            d_sae,
            d_in,
            NORM_ONLY=norm_only,
            SUM_BIAS=norm_only or not clipped,
            DENSE=dense is not None,
            GROUP=GROUP,
            MAX_SEGMENT=csc.max_segment,
            maxnreg=UPDATE_REGISTERS,
            **tiling.launch,
        )

    run(norm_only=clipped)
    by_g, by_bias = g.sum(0), across.over_latents(by_biases.sum(0))
    norm = None
    if max_norm is not None:
        if across.shares_latents:
            squares = across.over_latents(squares.double().sum()[None])
        norm = clip_gradients(squares, by_g, by_bias, h.schedule, max_norm)
        run(norm_only=False)
    update_b_dec(b_dec, by_g, by_bias, h, n_dead, counters.n_dead)
    return norm
