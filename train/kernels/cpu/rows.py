"""Prepare rows of activations for training, block by block on a CPU."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

from ....shared.core.compute.cores import by_blocks


def normalise(
    rows: Float[Tensor, "batch d_in"],
    mean: Float[Tensor, " d_in"],
    factor: float | Float[Tensor, " d_in"],
    dtype: torch.dtype = torch.bfloat16,
    max_norm: float = math.inf,
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_in"]]:
    """Return `(rows - mean) * factor`, each row shortened to a norm of at most `max_norm`.

    It is in float32 and in `dtype`; one tensor twice if that is float32.
    """
    x = torch.empty(rows.shape, dtype=torch.float32)
    x_compute = x if dtype is torch.float32 else torch.empty(rows.shape, dtype=dtype)

    def of_block(block: slice) -> None:
        part = torch.sub(rows[block], mean, out=x[block]).mul_(factor)
        if math.isfinite(max_norm):
            part.mul_((max_norm / torch.linalg.vector_norm(part, dim=1, keepdim=True)).clamp_max_(1.0))
        if x_compute is not x:
            x_compute[block] = x[block]

    by_blocks(of_block, len(rows))
    return x, x_compute


def dequantise(
    values: Int8[Tensor, "rows d_in"],
    scales: Float[Tensor, " rows"],
    places: Int64[Tensor, " batch"],
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "batch d_in"]:
    """Return rows `places` of `scales * values`, rounded as the store's reader rounds them."""
    return (values[places].float() * scales[places, None]).to(dtype)
