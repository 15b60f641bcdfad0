"""The small kernels at both ends of a step, each in place of a dozen operations of PyTorch on a few numbers.

`begin_step` counts the step, `clip_gradients` and `update_b_dec` are parts of `update`, and `finish_step` computes the
metrics.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float64, Int32, Int64
from torch import Tensor

from ..fused_state import AdamState, DivergenceWatch, Hyperparameters, StepMetrics

_BLOCK = 1024


@triton.jit
def adam(weight, mean, square, gradient, lr, correction1, correction2, keep1, keep2, new1, new2, eps):
    """Return the new weight and its new moments (arXiv 1412.6980).

    The root is good to a unit in the last place: an exactly rounded one, and a division by the correction's, would be a
    sixth of what `update` computes.
    """
    mean = mean * keep1 + gradient * new1
    square = square * keep2 + gradient * gradient * new2
    weight -= (lr / correction1) * mean / (tl.sqrt(square) * (1.0 / tl.sqrt_rn(correction2)) + eps)
    return weight, mean, square


@triton.jit
def power(base, exponent):
    """Return `base ** exponent` for an integer from 0, by squaring."""
    result = tl.full([], 1.0, tl.float64)
    for _ in range(31):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base *= base
        exponent >>= 1
    return result


@triton.jit
def begin_kernel(
    steps_ptr, betas_ptr, schedule_ptr, offsets_ptr, n_rows, k, N_STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(offsets_ptr + place, place * k, mask=place <= n_rows)
    if tl.program_id(0) == 0:
        which = tl.arange(0, N_STEPS)
        steps = tl.load(steps_ptr + which) + 1.0
        # All threads have read the few numbers before one writes them.
        tl.debug_barrier()
        tl.store(steps_ptr + which, steps)
        step = tl.sum(tl.where(which == 0, steps, 0.0), axis=0).to(tl.int32)
        tl.store(schedule_ptr + 1, (1.0 - power(tl.load(betas_ptr), step)).to(tl.float32))
        tl.store(schedule_ptr + 2, (1.0 - power(tl.load(betas_ptr + 1), step)).to(tl.float32))


def begin_step(
    steps: Float[Tensor, " n"], betas: Float64[Tensor, " 2"], schedule: Float[Tensor, " 4"], n_rows: int, k: int
) -> Int64[Tensor, " rows_plus_1"]:
    """Add 1 to `steps`, a power of two of equal numbers, set Adam's corrections; return the offsets of `k` per row."""
    offsets = torch.empty(n_rows + 1, dtype=torch.int64, device=steps.device)
    begin_kernel[(triton.cdiv(n_rows + 1, _BLOCK),)](
        steps, betas, schedule, offsets, n_rows, k, N_STEPS=len(steps), BLOCK=_BLOCK
    )
    return offsets


@triton.jit
def clip_kernel(
    squares_ptr, by_g_ptr, by_bias_ptr, schedule_ptr, norm_ptr, n_squares, d_in, max_norm, BLOCK: tl.constexpr
):
    within = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_squares, BLOCK):
        place = start + within
        total += tl.load(squares_ptr + place, mask=place < n_squares, other=0.0).to(tl.float64)
    for start in range(0, d_in, BLOCK):
        place = start + within
        gradient = tl.load(by_g_ptr + place, mask=place < d_in, other=0.0)
        gradient -= tl.load(by_bias_ptr + place, mask=place < d_in, other=0.0)
        total += gradient.to(tl.float64) * gradient.to(tl.float64)
    norm = tl.sqrt(tl.sum(total, axis=0))
    tl.store(norm_ptr, norm)
    # A norm that is not a number must not become 1.
    coefficient = tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(schedule_ptr + 3, coefficient.to(tl.float32))


def clip_gradients(
    squares: Float[Tensor, " n"],
    by_g: Float[Tensor, " d_in"],
    by_bias: Float[Tensor, " d_in"],
    schedule: Float[Tensor, " 4"],
    max_norm: float,
) -> Float64[Tensor, ""]:
    """Return the norm of all gradients and set the coefficient in `schedule` that scales them to at most `max_norm`.

    `squares` are parts of the squared norm; `by_g - by_bias` is the gradient of `b_dec`, which is not in them.
    """
    norm = torch.empty((), dtype=torch.float64, device=schedule.device)
    clip_kernel[(1,)](squares, by_g, by_bias, schedule, norm, len(squares), len(by_g), max_norm, BLOCK=_BLOCK)
    return norm


@triton.jit
def update_b_dec_kernel(
    weight_ptr,
    mean_ptr,
    square_ptr,
    by_g_ptr,
    by_bias_ptr,
    schedule_ptr,
    keep1,
    keep2,
    new1,
    new2,
    eps,
    d_in,
    n_dead_of_groups_ptr,
    n_dead_ptr,
    n_groups,
    BLOCK: tl.constexpr,
):
    within = tl.arange(0, BLOCK)
    at = tl.program_id(0) * BLOCK + within
    mask = at < d_in
    gradient = tl.load(by_g_ptr + at, mask=mask, other=0.0) - tl.load(by_bias_ptr + at, mask=mask, other=0.0)
    weight, mean, square = adam(
        tl.load(weight_ptr + at, mask=mask, other=0.0),
        tl.load(mean_ptr + at, mask=mask, other=0.0),
        tl.load(square_ptr + at, mask=mask, other=0.0),
        gradient * tl.load(schedule_ptr + 3),
        tl.load(schedule_ptr),
        tl.load(schedule_ptr + 1),
        tl.load(schedule_ptr + 2),
        keep1,
        keep2,
        new1,
        new2,
        eps,
    )
    tl.store(weight_ptr + at, weight, mask=mask)
    tl.store(mean_ptr + at, mean, mask=mask)
    tl.store(square_ptr + at, square, mask=mask)
    if tl.program_id(0) == 0:
        n_dead = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n_groups, BLOCK):
            group = start + within
            n_dead += tl.load(n_dead_of_groups_ptr + group, mask=group < n_groups, other=0)
        tl.store(n_dead_ptr, tl.sum(n_dead, axis=0))


def update_b_dec(
    b_dec: AdamState,
    by_g: Float[Tensor, " d_in"],
    by_bias: Float[Tensor, " d_in"],
    hyperparameters: Hyperparameters,
    n_dead_of_groups: Int32[Tensor, " groups"],
    n_dead: Int32[Tensor, ""],
) -> None:
    """Apply Adam to `b_dec`, whose gradient is `by_g - by_bias`, and set `n_dead` to the sum over groups."""
    h, d_in = hyperparameters, len(by_g)
    update_b_dec_kernel[(triton.cdiv(d_in, 256),)](
        b_dec.weight,
        b_dec.mean,
        b_dec.square,
        by_g,
        by_bias,
        h.schedule,
        h.beta1,
        h.beta2,
        1 - h.beta1,
        1 - h.beta2,
        h.eps,
        d_in,
        n_dead_of_groups,
        n_dead,
        len(n_dead_of_groups),
        BLOCK=256,
    )


@triton.jit
def finish_kernel(
    squared_error_ptr,
    n_active_ptr,
    auxk_squared_error_ptr,
    n_dead_ptr,
    now_ptr,
    failure_ptr,
    metrics_ptr,
    n_rows,
    total_variance,
    aux_coefficient,
    limit,
    AUXK: tl.constexpr,
    WATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    squared_error = tl.zeros([BLOCK], tl.float64)
    n_active = tl.zeros([BLOCK], tl.int64)
    for start in range(0, n_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        squared_error += tl.load(squared_error_ptr + row, mask=row < n_rows, other=0.0).to(tl.float64)
        n_active += tl.load(n_active_ptr + row, mask=row < n_rows, other=0).to(tl.int64)
    total = tl.sum(squared_error, axis=0)
    n_dead = tl.load(n_dead_ptr)
    mse = total / n_rows
    unexplained = mse / total_variance
    auxk_loss = tl.full([], 0.0, tl.float64)
    if AUXK:
        some = (n_dead > 0) & (total > 0)
        auxk_loss = aux_coefficient * tl.load(auxk_squared_error_ptr).to(tl.float64) / tl.where(some, total, 1.0)
        auxk_loss = tl.where(some, auxk_loss, 0.0)
    loss = unexplained + auxk_loss
    tl.store(metrics_ptr, loss)
    tl.store(metrics_ptr + 1, mse)
    tl.store(metrics_ptr + 2, tl.sum(n_active, axis=0).to(tl.float64) / n_rows)
    tl.store(metrics_ptr + 3, unexplained)
    tl.store(metrics_ptr + 4, auxk_loss)
    tl.store(metrics_ptr + 5, 1.0 - unexplained)
    tl.store(metrics_ptr + 6, n_dead.to(tl.float64))
    if WATCH:
        sound = (tl.abs(loss) < float("inf")) & (mse <= limit)
        first = (sound == 0) & (tl.load(failure_ptr) == 0)
        tl.store(failure_ptr, tl.load(now_ptr), mask=first)
        tl.store(failure_ptr + 1, loss, mask=first)
        tl.store(failure_ptr + 2, mse, mask=first)


def finish_step(
    squared_error: Float[Tensor, " batch"],
    n_active: Int32[Tensor, " batch"],
    n_dead: Int32[Tensor, ""],
    total_variance: float,
    auxk_squared_error: Float[Tensor, ""] | None = None,
    aux_coefficient: float = 0.0,
    watch: DivergenceWatch | None = None,
) -> StepMetrics:
    """Return a step's metrics, and note in `watch` whether it is the first that diverged.

    AuxK's loss is its squared error, relative to that of the reconstruction, times the coefficient; 0 if no latent is
    dead or the reconstruction is exact.
    """
    metrics = torch.empty(len(StepMetrics._fields), dtype=torch.float64, device=squared_error.device)
    now, failure, limit = watch or (metrics, metrics, 0.0)
    finish_kernel[(1,)](
        squared_error,
        n_active,
        squared_error if auxk_squared_error is None else auxk_squared_error,
        n_dead,
        now,
        failure,
        metrics,
        len(squared_error),
        total_variance,
        aux_coefficient,
        limit,
        AUXK=auxk_squared_error is not None,
        WATCH=watch is not None,
        BLOCK=_BLOCK,
    )
    return StepMetrics(*metrics.unbind())
