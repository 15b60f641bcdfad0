"""Cross-layer transcoders with ReLU and an L1 penalty weighted by decoder norms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Batch, Number, Parameters, StepInput, StepOutput
from ..parts.latents import count
from ..registry import register
from ..standard import Standard, StandardConfig
from .base import CrossLayer
from .layers import entries_above, squared_errors


@register(StandardConfig, cross_layer=True)
class CrossLayerStandard(CrossLayer[StandardConfig], Standard[StandardConfig]):
    """`f_l = ReLU(W_enc_l x_l + b_enc_l)`, loss `sum_m ||y_m - y_hat_m||^2 + lambda sum_i f_i ||W_dec_i||`.

    Sums over latents include all layers, and `||W_dec_i||` is the norm of a latent's decoders for all its targets,
    concatenated, as in the penalty of "Circuit Tracing".
    """

    activation = "relu"
    refused = (*CrossLayer.refused, "p_final", "p_anneal_steps")

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Set the encoders' biases so that each latent fires on its share of the first batch, with a target L0."""
        if self.config.target_l0 is not None:
            n_active = round(len(batch.x) * self.config.target_l0 / self.d_sae)
            parameters["b_enc"].copy_(-self.exceeded_by(parameters, batch, n_active))

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        layers, y, W_dec = self.layers, batch.x if batch.target is None else batch.target, parameters["W_dec"]
        inputs = layers.inputs(parameters, batch, step)
        latents = [entries_above(one, step) for one in inputs]
        values = [some.pre_acts.relu() for some in latents]
        errors = layers.errors(latents, values, W_dec, parameters["b_dec"], y)
        scale = 2 / len(y)
        g = [error * scale for error in errors]
        penalty = self.penalty_weight * step.sparsity_scale / len(y)
        norms = layers.decoder_norms(W_dec)
        by_pre_acts = [
            layers.grad_values(i, some, g, W_dec).add_(some.spread(norms[layers.latents(i)] * penalty)).mul_(acts > 0)
            for i, (some, acts) in enumerate(zip(latents, values, strict=True))
        ]
        gradients = layers.gradients_of(parameters, inputs, latents, g, values, by_pre_acts)
        sums = torch.cat([some.sum(acts) for some, acts in zip(latents, values, strict=True)])
        gradients["W_dec"] += layers.scale_decoders(W_dec, sums * penalty / norms.clamp_min(1e-12))
        mse = squared_errors(errors) / len(y)
        terms: dict[str, Number] = {"mse_loss": mse, "l1_loss": (sums @ norms).double() * penalty}
        l0 = _count_positive(values) / len(y)
        return StepOutput(gradients, sums > 0, sum(terms.values()), mse, l0, terms)


def _count_positive(values: list[Tensor]) -> Tensor:
    return torch.stack([count(acts > 0) for acts in values]).sum()
