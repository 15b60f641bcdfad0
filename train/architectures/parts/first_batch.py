"""Start latents at a given sparsity by what the first batch shows."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, cat

from ..contract import Parameters

_LATENT_BLOCK = 1024


def exceeded_by(parameters: Parameters, x: Float[Tensor, "batch d_in"], n_rows: int) -> Float[Tensor, " d_sae"]:
    """Return for each latent the value that `W_enc (x - b_dec)` exceeds in so many rows: at least one, not in all."""
    centred, n_rows = x - parameters["b_dec"], min(max(1, n_rows), len(x) - 1)
    blocks = parameters["W_enc"].split(_LATENT_BLOCK)
    return cat([(centred @ block.T).topk(n_rows + 1, dim=0).values[-1] for block in blocks])
