"""Fold the norms of decoder rows into the encoder."""

from __future__ import annotations

from torch import Tensor


def fold_decoder_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return saved tensors whose decoder rows have unit norm and whose latents took the norms."""
    norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
    by_latent = ("W_enc", "b_enc", "threshold", "b_gate", "b_mag")
    scaled = {name: tensors[name] * norms for name in by_latent if name in tensors}
    return tensors | scaled | {"W_dec": tensors["W_dec"] / norms[:, None]}
