"""Crosscoders: one set of latents for several hook points (Anthropic, October 2024)."""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from ...shared.core.errors import SaeError
from ...shared.sae import Sae
from ..stream.normalization import Normalization
from .base import Architecture
from .contract import Buffers, Parameters
from .registry import register
from .transcoder import DecoderPenaltyConfig, Transcoder


class CrosscoderConfig(DecoderPenaltyConfig, frozen=True, kw_only=True):
    """Crosscoder: one set of latents for several hook points (Anthropic, October 2024)."""

    architecture: Literal["crosscoder"] = "crosscoder"


@register(CrosscoderConfig)
class Crosscoder(Transcoder[CrosscoderConfig]):
    """`f = ReLU(sum_l W_enc_l x_l + b_enc)`, loss `sum_l ||x_l - x_hat_l||^2 + lambda sum_i f_i sum_l ||W_dec_l_i||`.

    Its rows are those of its hook points, of equal width, one after the other.
    """

    saved_as = "crosscoder"
    capturable = True
    kind_of_wiring = "crosscoder"

    def blocks(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae n d"]:
        """Return the decoder by hook point."""
        return W_dec.view(len(W_dec), len(self.config.wiring.reads), -1)

    def _held(self, sae: Sae) -> dict[str, Tensor]:
        """Return the tensors with the hook points, which are matched by name, in this crosscoder's order."""
        tensors = {name: tensor.detach() for name, tensor in sae.named_parameters()}
        ours = list(self.config.wiring.reads)
        theirs = list(sae.config.get("hook_points", ours))
        if sorted(theirs) != sorted(ours):
            raise SaeError(f"the crosscoder is of {', '.join(theirs)}; expected {', '.join(ours)}, in any order")
        order = [theirs.index(name) for name in ours]
        n = len(order)
        W_enc, W_dec, b_dec = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
        return tensors | {
            "W_enc": W_enc.view(n, -1, W_enc.shape[1])[order].reshape(W_enc.shape),
            "W_dec": W_dec.view(len(W_dec), n, -1)[:, order].reshape(W_dec.shape),
            "b_dec": b_dec.view(n, -1)[order].reshape(-1),
        }

    def check_source(self, sae: Sae) -> None:
        """Raise `SaeError` if the crosscoder is of other hook points."""
        self._held(sae)

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Return that the hook points change their order."""
        theirs = list(sae.config["hook_points"])
        same = theirs == list(self.config.wiring.reads)
        return [] if same else [f"its hook points {theirs} are put in this SAE's order"]

    def hyperparameters(self) -> dict[str, Any]:
        """Add the hook points, and that the encoder does not subtract `b_dec`."""
        hook_points = list(self.config.wiring.reads)
        return super().hyperparameters() | {"hook_points": hook_points, "apply_b_dec_to_input": False}

    def to_sae(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization, metadata: dict[str, Any]
    ) -> Sae:
        """Return the crosscoder as an `Sae` of concatenated rows."""
        return Architecture.to_sae(self, parameters, buffers, normalization, metadata)
