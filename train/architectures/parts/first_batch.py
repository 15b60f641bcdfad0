"""Choose initial thresholds, biases and the encoder's scale, so that latents start at a given sparsity and size."""

from __future__ import annotations

from statistics import NormalDist

from jaxtyping import Float
from torch import Tensor, cat

from ..contract import Parameters

PUBLISHED_NORM = 0.1  # of decoder and encoder rows, where half of all latents fire at first
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


def first_encoder_scale(k: float, d_sae: int, d_in: int) -> float:
    """Return the norm of encoder rows at which random directions reconstruct best when the k largest latents fire.

    Products of unit directions with an input `x` are distributed like `|x| / sqrt(d_in)` times a normal variable, so
    the squares of the k largest of `d_sae` sum to `r |x|^2`, with `r` as below. With encoder rows of norm `s` they
    reconstruct `s r x` and an error of length `s sqrt(r) |x|`, which is best for `s = 1 / (1 + r)`. At norm 1 the first
    reconstructions would be larger than the inputs, and latents die while they shrink (compare arXiv 2406.04093, A.1,
    which matches lengths).
    """
    normal, share = NormalDist(), min(k / d_sae, 0.5)
    least = normal.inv_cdf(1 - share)
    r = (least * normal.pdf(least) + share) * d_sae / d_in
    return 1 / (1 + r)


def unused_start(**given: float | None) -> list[str]:
    """Return a line for each key that sets initial values and is not used, because training starts from an SAE."""
    return [
        f"{key} = {value:g} is not used: thresholds and biases start at the SAE's"
        for key, value in given.items()
        if value is not None
    ]
