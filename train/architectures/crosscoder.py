"""Crosscoders: one set of latents for several hook points (Anthropic, October 2024)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...shared.sae import Sae
from ..stream.normalization import Normalization
from .base import Architecture
from .contract import Buffers, Parameters
from .transcoder import Transcoder


class Crosscoder(Transcoder):
    """`f = ReLU(sum_l W_enc_l x_l + b_enc)`, loss `sum_l ||x_l - x_hat_l||^2 + lambda sum_i f_i sum_l ||W_dec_l_i||`.

    Its rows are those of its hook points, of equal width, one after the other.
    """

    name = "crosscoder"
    capturable = True
    kind_of_wiring = "crosscoder"
    options = ("sparsity_warmup_steps",)

    def blocks(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae n d"]:
        """Return the decoder by hook point."""
        return W_dec.view(len(W_dec), len(self.config.wiring.reads), -1)

    def hyperparameters(self) -> dict[str, Any]:
        """Add the hook points, and that the encoder does not subtract `b_dec`."""
        hook_points = list(self.config.wiring.reads)
        return super().hyperparameters() | {"hook_points": hook_points, "apply_b_dec_to_input": False}

    def to_sae(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization, metadata: dict[str, Any]
    ) -> Sae:
        """Return the crosscoder as an `Sae` of concatenated rows."""
        return Architecture.to_sae(self, parameters, buffers, normalization, metadata)
