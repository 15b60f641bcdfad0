"""Choose initial thresholds or biases from the first batch, so that latents start at a given sparsity."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, cat

from ..contract import Parameters

_LATENT_BLOCK = 1024


def exceeded_by(
    parameters: Parameters, x: Float[Tensor, "batch d_in"], n_rows: int, centred: bool
) -> Float[Tensor, " d_sae"]:
    """Return for each latent the value that its product with the input exceeds in `n_rows` rows.

    At least one row exceeds it, but not all. The encoder multiplies `x - b_dec` if it is `centred`, otherwise `x`.
    """
    inputs, n_rows = x - parameters["b_dec"] if centred else x, min(max(1, n_rows), len(x) - 1)
    blocks = parameters["W_enc"].split(_LATENT_BLOCK)
    return cat([(inputs @ block.T).topk(n_rows + 1, dim=0).values[-1] for block in blocks])
