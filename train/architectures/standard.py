"""Standard: ReLU and an L1 penalty weighted by decoder norms (Anthropic, April 2024 update)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stream.normalization import Normalization
from .base import Architecture
from .contract import Batch, Buffers, Number, Parameters, StepInput, StepOutput
from .parts.dense import squared
from .parts.latents import above_threshold, count, encoded_bias, gradients_of


class Standard(Architecture):
    """`f = ReLU(W_enc (x - b_dec) + b_enc)`, loss `||x - x_hat||^2 + lambda sum_i f_i ||W_dec_i||`.

    Decoder norms are free while training and folded into the encoder on saving.
    """

    name = "standard"
    capturable = True
    required = ("l1_coefficient",)
    options = ("sparsity_warmup_steps", "p_final", "p_anneal_steps")
    unit_norm_decoder = False
    eps = 1e-8
    revives_dead = False

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return decoder rows of norm 0.1 and the encoder their transpose."""
        parameters = super().initial_parameters(generator)
        parameters["W_dec"] *= 0.1
        parameters["W_enc"] *= 0.1
        return parameters

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec = batch.x, parameters["W_dec"]
        latents = above_threshold(step, parameters, batch, encoded_bias(parameters))
        values = latents.pre_acts.relu()
        active = values > 0
        penalty = (self.config.l1_coefficient or 0.0) * step.sparsity_scale / len(x)
        norms = W_dec.norm(dim=1)
        error = (latents.decode(values, W_dec) + parameters["b_dec"]).sub_(x)
        g = error * (2 / len(x))
        by_values = latents.grad_values(g, W_dec).add_(latents.spread(norms * penalty))
        gradients = gradients_of(parameters, latents, x, g, values, by_values.mul_(active))
        sums = latents.sum(values)
        gradients["W_dec"].addcmul_((sums * penalty / norms.clamp_min(1e-12))[:, None], W_dec)
        mse = squared(error) / len(x)
        terms: dict[str, Number] = {"mse_loss": mse, "l1_loss": (sums @ norms).double() * penalty}
        l0 = count(active) / len(x)
        return StepOutput(gradients, sums > 0, sum(terms.values()), mse, l0, terms)

    def exported(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization
    ) -> tuple[str, dict[str, Tensor]]:
        """Fold the decoder's norms into the encoder, so that saved decoder rows have unit norm."""
        architecture, tensors = super().exported(parameters, buffers, normalization)
        return architecture, fold_decoder_norms(tensors)


def fold_decoder_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return saved tensors whose decoder rows have unit norm and whose latents took the norms."""
    norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
    by_latent = ("W_enc", "b_enc", "threshold", "b_gate", "b_mag")
    scaled = {name: tensors[name] * norms for name in by_latent if name in tensors}
    return tensors | scaled | {"W_dec": tensors["W_dec"] / norms[:, None]}
