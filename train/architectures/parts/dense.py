"""Dense operations on a batch or on weights: on a CPU in blocks on all cores, elsewhere with one operator."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.compute.cores import by_blocks
from ..contract import Batch, Parameters

_LATENTS_AT_ONCE = 2048


def product(a: Float[Tensor, "n m"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
    """Return `a b`."""
    if not a.is_cpu:
        return a @ b
    out = a.new_empty(len(a), b.shape[1])
    by_blocks(lambda rows: torch.mm(a[rows], b, out=out[rows]), len(a))
    return out


def encoder_transpose_times(
    W_enc: Float[Tensor, "d_sae d_in"], by_latent: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_in"]:
    """Return `W_enc^T by_latent`; on a CPU, as the sum over blocks."""
    if not W_enc.is_cpu:
        return W_enc.T @ by_latent
    return torch.stack(by_blocks(lambda part: W_enc[part].T @ by_latent[part], len(W_enc), _LATENTS_AT_ONCE)).sum(0)


def error_of(
    decoded: Float[Tensor, "batch d_out"], parameters: Parameters, batch: Batch
) -> Float[Tensor, "batch d_out"]:
    """Return `decoded + b_dec - y`, plus `W_skip x` if there is a skip path, in the memory of `decoded`."""
    b_dec, W_skip = parameters["b_dec"], parameters.get("W_skip")

    def subtract(rows: slice) -> None:
        part = decoded[rows].add_(b_dec).sub_(batch.y[rows])
        if W_skip is not None:
            part.addmm_(batch.x[rows], W_skip.T)

    if decoded.is_cpu:
        by_blocks(subtract, len(decoded))
    else:
        subtract(slice(None))
    return decoded


def error_of_nothing(parameters: Parameters, batch: Batch) -> Float[Tensor, "batch d_out"]:
    """Return the error of a reconstruction from no latents."""
    error = parameters["b_dec"] - batch.y
    return error.addmm_(batch.x, parameters["W_skip"].T) if "W_skip" in parameters else error


def weighted(error: Float[Tensor, "batch d"], batch: Batch) -> Float[Tensor, "batch d"]:
    """Multiply the errors of rows by the rows' weights, if they have any, in place."""
    return error if batch.row_weights is None else error.mul_(batch.row_weights)


def squared(error: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Return the sum of squares on the device, in float64 like a Python number."""
    if not error.is_cpu:
        return error.square().sum().double()
    norms = by_blocks(lambda rows: torch.linalg.vector_norm(error[rows], dim=1), len(error))
    return torch.cat(norms).square_().sum(dtype=torch.float64)


def sum_of_rows(g: Float[Tensor, "batch d"]) -> Float[Tensor, " d"]:
    """Return the sum of all rows; on a CPU, as the sum over blocks."""
    if not g.is_cpu:
        return g.sum(0)
    return torch.stack(by_blocks(lambda rows: g[rows].sum(0), len(g))).sum(0)


def cast(x: Float[Tensor, "batch d"], dtype: torch.dtype) -> Float[Tensor, "batch d"]:
    """Return a copy in another precision, or the tensor itself if it already has it."""
    if not x.is_cpu or x.dtype is dtype:
        return x.to(dtype)
    copy = torch.empty(x.shape, dtype=dtype)
    by_blocks(lambda rows: copy[rows].copy_(x[rows]), len(x))
    return copy
