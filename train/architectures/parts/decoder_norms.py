"""Norms of decoder rows, and folding them into the encoder."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

NORM_TOLERANCE = 1e-3
"""Decoder rows have unit norm if their norms differ from 1 by at most this."""


def has_unit_norms(W_dec: Float[Tensor, "d_sae d_out"]) -> bool:
    """Return whether all decoder rows have unit norm."""
    return float((W_dec.detach().norm(dim=1) - 1).abs().max()) <= NORM_TOLERANCE


def fold_decoder_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return saved tensors whose decoder rows have unit norm and whose latents took the norms."""
    norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
    by_latent = ("W_enc", "b_enc", "threshold", "b_gate", "b_mag")
    scaled = {name: tensors[name] * norms for name in by_latent if name in tensors}
    return tensors | scaled | {"W_dec": tensors["W_dec"] / norms[:, None]}
