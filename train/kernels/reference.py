"""The sparse operations in plain PyTorch: the specification of every other backend.

Sparse latents are CSR by row: `values [nnz]`, `indices [nnz]`, `offsets [batch + 1]`; TopK has `k` entries in every
row. The operations run on any device, are differentiable where PyTorch's are, and accumulate in float32 or wider. They
are written for clarity, not speed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Int8, Int32, Int64
from torch import Tensor

from .backend import Backend
from .cpu import topk
from .csc import SegmentedCsc
from .entries import entries_of, torch_topk
from .fused_state import (
    AdamState,
    DenseGradients,
    DivergenceWatch,
    Hyperparameters,
    LatentCounters,
    StepMetrics,
)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in the data type for accumulation: float64 if it is float64, else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rows_of(offsets: Int[Tensor, " batch_plus_1"], nnz: int) -> Int[Tensor, " nnz"]:
    """Return the row of each of the `nnz` entries of a CSR matrix."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff().long(), output_size=nnz)


def pre_activations(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """Return `x W_enc^T + b_enc`; each row of `W_enc` is a latent."""
    return wide(x) @ wide(W_enc).T + wide(b_enc)


def select_topk(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"], k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the `k` largest latents of each row, after ReLU, and their indices."""
    top_acts, top_indices = pre_activations(x, W_enc, b_enc).topk(k, dim=1)
    return top_acts.relu(), top_indices


def select_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"] | float,
) -> tuple[Float[Tensor, " nnz"], Int[Tensor, " nnz"], Int[Tensor, " batch_plus_1"]]:
    """Return, as CSR, the latents whose pre-activation is above `threshold`: ReLU at 0, JumpReLU at theta."""
    pre_acts = pre_activations(x, W_enc, b_enc)
    chosen = pre_acts > threshold
    indices, offsets = entries_of(chosen)
    return pre_acts[chosen], indices, offsets


def select_batch_topk(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"], k: int
) -> tuple[tuple[Float[Tensor, " nnz"], Int[Tensor, " nnz"], Int[Tensor, " batch_plus_1"]], Float[Tensor, ""]]:
    """Return, as CSR, the `batch * k` largest positive latents of the batch, and the smallest of them.

    If fewer are positive, the smallest is returned as 0. Ties with the smallest go to the earlier row, then latent.
    """
    pre_acts = pre_activations(x, W_enc, b_enc)
    wanted = len(x) * k
    largest = pre_acts.flatten().sort(descending=True, stable=True)
    places = largest.indices[:wanted][largest.values[:wanted] > 0].sort().values
    values, rows, latents = pre_acts.flatten()[places], places // len(W_enc), places % len(W_enc)
    offsets = torch.zeros(len(x) + 1, dtype=torch.long, device=x.device)
    offsets[1:] = torch.bincount(rows, minlength=len(x)).cumsum(0)
    least = values.min() if len(values) == wanted and wanted else values.new_zeros(())
    return (values, latents, offsets), least


def decode(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    W_dec: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "batch d_in"]:
    """Return `sum_j values_j W_dec[indices_j]` for each row."""
    rows = rows_of(offsets, len(values))
    terms = wide(values)[:, None] * wide(W_dec)[indices.long()]
    return terms.new_zeros(len(offsets) - 1, W_dec.shape[1]).index_add(0, rows, terms)


def grad_values(
    g: Float[Tensor, "batch d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    csc: Any = None,
) -> Float[Tensor, " nnz"]:
    """Return `g[row_j] . W_dec[indices_j]` for each entry."""
    rows = rows_of(offsets, len(indices))
    return (wide(g)[rows] * wide(W_dec)[indices.long()]).sum(1)


def grad_weights(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    g: Float[Tensor, "batch d_in"],
    d_sae: int,
    csc: Any = None,
) -> Float[Tensor, "d_sae d_in"]:
    """Return for each latent the sum of `values_j g[row_j]` over its entries; zero for an unused latent."""
    rows = rows_of(offsets, len(values))
    terms = wide(values)[:, None] * wide(g)[rows]
    return terms.new_zeros(d_sae, g.shape[1]).index_add(0, indices.long(), terms)


def sum_by_latent(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    d_sae: int,
    csc: Any = None,
) -> Float[Tensor, " d_sae"]:
    """Return the sum of each latent's values, as the gradients of biases and thresholds need it."""
    return wide(values).new_zeros(d_sae).index_add(0, indices.long(), wide(values))


def grad_weights_and_bias(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch_plus_1"],
    g: Float[Tensor, "batch d_in"],
    d_sae: int,
    csc: Any = None,
) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, " d_sae"]]:
    """Return `grad_weights` and `sum_by_latent` of the same values."""
    return grad_weights(values, indices, offsets, g, d_sae), sum_by_latent(values, indices, offsets, d_sae)


def reconstruct(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "batch d_in"],
    scale: float,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d_in"], Float[Tensor, " nnz"], Int[Tensor, " batch"]]:
    """Return each token's squared error, `g = scale * (x_hat - target)`, `g . W_dec[i]` where a value is > 0, L0.

    Each token has `nnz / batch` entries.
    """
    n = len(target)
    offsets = torch.arange(n + 1, device=values.device) * (len(values) // n)
    residual = decode(values, indices, offsets, W_dec) + wide(b_dec) - wide(target)
    g, active = scale * residual, values > 0
    return (
        residual.square().sum(1),
        g,
        grad_values(g, W_dec, indices, offsets) * active,
        active.view(n, -1).sum(1).int(),
    )


def auxk_residual(
    e_hat: Float[Tensor, "rows d_in"],
    g: Float[Tensor, "rows d_in"],
    scale: float,
    total: Float[Tensor, ""],
    coefficient: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows d_in"]]:
    """Return each row's squared error of `e_hat` and, in `dtype`, the gradient of AuxK's loss with respect to it."""
    difference = wide(e_hat) + g / scale
    weight = torch.where(total > 0, 2 * coefficient / total, 0.0)
    return difference.square().sum(1), (difference * weight).to(dtype)


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
) -> Float64[Tensor, ""] | None:
    """Update parameters and counters in place from a step's sparse entries; return the gradient norm if clipped."""
    n_entries = int(csc.starts[-1])
    order, rows = csc.order[:n_entries], csc.rows[:n_entries].long()
    latents = torch.repeat_interleave(torch.arange(len(csc.starts) - 1, device=x.device), csc.starts.diff())

    def summed(terms: Tensor, state: AdamState) -> Tensor:
        return terms.new_zeros(state.weight.shape).index_add(0, latents, terms)

    by_dec = summed(wide(acts)[order, None] * wide(g)[rows], W_dec)
    by_enc = summed(wide(grad_pre_acts)[order, None] * wide(x)[rows], W_enc)
    by_bias = summed(wide(grad_pre_acts)[order], b_enc)
    if dense is not None:
        there = dense.slots >= 0
        for total, rows_of_dense in ((by_enc, dense.W_enc), (by_dec, dense.W_dec), (by_bias, dense.b_enc)):
            total[there] += rows_of_dense[dense.slots[there].long()]
    by_g, through_encoder = wide(g).sum(0), by_bias @ W_enc.weight
    by_enc -= by_bias[:, None] * b_dec.weight
    # The norm of a decoder row is not trained (2406.04093, A.1).
    along = (by_dec * W_dec.weight).sum(1, keepdim=True) / W_dec.weight.square().sum(1, keepdim=True)
    by_dec -= along * W_dec.weight
    gradients = ((W_enc, by_enc), (b_enc, by_bias), (W_dec, by_dec))
    norm = None
    if max_norm is not None:
        squares = torch.stack([gradient.double().square().sum() for _, gradient in gradients])
        norm = clip_gradients(squares, by_g, through_encoder, hyperparameters.schedule, max_norm)
    for state, gradient in gradients:
        _adam(state, gradient, hyperparameters, hyperparameters.decoder_lr_scale if state is W_dec else 1.0)
    W_dec.weight.div_(W_dec.weight.norm(dim=1, keepdim=True))
    for state in (W_enc, W_dec):
        state.shadow.copy_(state.weight)
    n_dead = (counters.tokens_since_fired >= counters.dead_after_tokens).int()
    update_b_dec(b_dec, by_g, through_encoder, hyperparameters, n_dead, counters.n_dead)
    counters.tokens_since_fired.add_(len(x))
    counters.tokens_since_fired[latents[acts[order] > 0]] = 0
    return norm


def _adam(state: AdamState, gradient: Tensor, hyperparameters: Hyperparameters, lr_scale: float = 1.0) -> None:
    lr, correction1, correction2, coefficient = hyperparameters.schedule
    state.mean.lerp_(gradient * coefficient, 1 - hyperparameters.beta1)
    state.square.lerp_((gradient * coefficient).square(), 1 - hyperparameters.beta2)
    denominator = (state.square / correction2).sqrt() + hyperparameters.eps
    state.weight.sub_(lr_scale * lr / correction1 * state.mean / denominator)


def begin_step(
    steps: Float[Tensor, " n"], betas: Float64[Tensor, " 2"], schedule: Float[Tensor, " 4"], n_rows: int, k: int
) -> Int64[Tensor, " rows_plus_1"]:
    """Add 1 to `steps`, all equal, and set Adam's corrections; return the offsets of `k` entries per row."""
    steps += 1
    schedule[1:3] = 1 - betas ** steps[0].double()
    return torch.arange(n_rows + 1, device=steps.device) * k


def clip_gradients(
    squares: Float[Tensor, " n"],
    by_g: Float[Tensor, " d_in"],
    by_bias: Float[Tensor, " d_in"],
    schedule: Float[Tensor, " 4"],
    max_norm: float,
) -> Float64[Tensor, ""]:
    """Return the norm of gradients with `squares` and of `by_g - by_bias`, and set the coefficient that clips it."""
    norm = (squares.double().sum() + (by_g - by_bias).double().square().sum()).sqrt()
    schedule[3] = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm


def update_b_dec(
    b_dec: AdamState,
    by_g: Float[Tensor, " d_in"],
    by_bias: Float[Tensor, " d_in"],
    hyperparameters: Hyperparameters,
    n_dead_of_groups: Int32[Tensor, " groups"],
    n_dead: Int32[Tensor, ""],
) -> None:
    """Apply Adam to `b_dec`, whose gradient is `by_g - by_bias`, and set `n_dead` to the sum over groups."""
    _adam(b_dec, by_g - by_bias, hyperparameters)
    n_dead.copy_(n_dead_of_groups.sum())


def finish_step(
    squared_error: Float[Tensor, " batch"],
    n_active: Int32[Tensor, " batch"],
    n_dead: Int32[Tensor, ""],
    total_variance: float,
    auxk_squared_error: Float[Tensor, ""] | None = None,
    aux_coefficient: float = 0.0,
    watch: DivergenceWatch | None = None,
) -> StepMetrics:
    """Return a step's metrics, and note in `watch` whether it is the first that diverged."""
    total, l0 = squared_error.double().sum(), n_active.double().mean()
    mse = total / len(squared_error)
    unexplained, auxiliary = mse / total_variance, torch.zeros_like(mse)
    if auxk_squared_error is not None and n_dead > 0 and total > 0:
        auxiliary = aux_coefficient * auxk_squared_error / total
    loss = unexplained + auxiliary
    if watch is not None and watch.failure[0] == 0 and not (loss.isfinite() and mse <= watch.limit):
        watch.failure.copy_(torch.stack([watch.now[0], loss, mse]))
    return StepMetrics(loss, mse, l0, unexplained, auxiliary, 1 - unexplained, n_dead.double())


def to_csc(indices: Int[Tensor, " nnz"], offsets: Int[Tensor, " batch_plus_1"], d_sae: int) -> None:
    """Return None: the reference does not need sorted entries."""


def topk_of_rows(pre_acts: Float[Tensor, "batch n"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return each row's `k` largest entries and their columns, in any order; on a CPU with the cpu backend's code."""
    return topk.topk_of_rows(pre_acts, k) if pre_acts.is_cpu else torch_topk(pre_acts, k)


def dequantise(
    values: Int8[Tensor, "rows d_in"],
    scales: Float[Tensor, " rows"],
    places: Int[Tensor, " batch"],
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "batch d_in"]:
    """Return rows `places` of `scales * values`."""
    return (values[places].float() * scales[places, None]).to(dtype)


def shortening(x: Float[Tensor, "batch d_in"], max_norm: float) -> Float[Tensor, "batch 1"]:
    """Return the factors that shorten rows to at most `max_norm`: 1 for rows within it."""
    return (max_norm / torch.linalg.vector_norm(x, dim=1, keepdim=True)).clamp_max(1.0)


def normalise(
    rows: Float[Tensor, "batch d_in"],
    mean: Float[Tensor, " d_in"],
    factor: float | Float[Tensor, " d_in"],
    dtype: torch.dtype = torch.bfloat16,
    max_norm: float = math.inf,
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_in"]]:
    """Return `(rows - mean) * factor`, shortened to at most `max_norm`, in float32 and in the `dtype` of products."""
    x = (rows.float() - mean) * factor
    x = x * shortening(x, max_norm)
    return x, x.to(dtype)


class Reference(Backend):
    """Plain PyTorch on any device."""

    name = "reference"
    pre_activations = staticmethod(pre_activations)
    select_topk = staticmethod(select_topk)
    decode = staticmethod(decode)
    grad_values = staticmethod(grad_values)
    grad_weights = staticmethod(grad_weights)
    grad_weights_and_bias = staticmethod(grad_weights_and_bias)
    sum_by_latent = staticmethod(sum_by_latent)
    to_csc = staticmethod(to_csc)
    topk_of_rows = staticmethod(topk_of_rows)
    normalise = staticmethod(normalise)
    dequantise = staticmethod(dequantise)
