"""The norms of decoder rows: the weights of latents in penalties, and how to fold them into the encoder."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

NORM_TOLERANCE = 1e-3
"""Largest difference from 1 of the norm of a decoder row that counts as a unit norm."""


def are_unit_norms(norms: Float[Tensor, " d_sae"]) -> bool:
    """Return whether all norms are one."""
    return float((norms - 1).abs().max()) <= NORM_TOLERANCE


def fold_decoder_norms(tensors: dict[str, Tensor], n_targets: int = 1) -> dict[str, Tensor]:
    """Return saved tensors with the norms of decoder rows folded into the latents, so that rows have unit norm.

    With several targets, a row's norm is the sum of its norms for them.
    """
    norms = DecoderNorms.of(tensors["W_dec"], n_targets).sums.clamp_min(1e-8)
    by_latent = ("W_enc", "b_enc", "threshold", "first_threshold", "b_gate", "b_mag")
    scaled = {name: tensors[name] * norms for name in by_latent if name in tensors}
    return tensors | scaled | {"W_dec": tensors["W_dec"] / norms[:, None]}


@dataclass(frozen=True)
class DecoderNorms:
    """The norms that weight latents in penalties: those of a row at each hook point that is written, and their sum.

    The sum, not the norm of the whole row, is the penalty of crosscoders (Anthropic, "Sparse crosscoders", 2024).
    """

    by_target: Float[Tensor, "d_sae targets"]
    sums: Float[Tensor, " d_sae"]

    @classmethod
    def of(cls, W_dec: Float[Tensor, "d_sae d_out"], n_targets: int) -> DecoderNorms:
        """Return the norms of decoder rows, which are concatenated by target."""
        by_target = W_dec.reshape(len(W_dec), n_targets, -1).norm(dim=2)
        return cls(by_target, by_target.sum(1))

    def add_gradient(
        self, gradient: Float[Tensor, "d_sae d_out"], W_dec: Float[Tensor, "d_sae d_out"], by_sums: Tensor, fused: bool
    ) -> None:
        """Add to the decoder's gradient the contribution of a gradient with respect to the sums.

        `fused` rounds a product and a sum only once. SAEs and transcoders differ in this, as in earlier releases, so
        that the weights of neither change.
        """
        shape = (*self.by_target.shape, -1)
        factors = (by_sums[:, None] / self.by_target.clamp_min(1e-12))[:, :, None]
        if fused:
            gradient.view(shape).addcmul_(factors, W_dec.view(shape))
        else:
            gradient.view(shape).add_(W_dec.view(shape) * factors)
