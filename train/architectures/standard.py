"""Standard: ReLU and an L1 penalty weighted by decoder norms (Anthropic, April 2024 update)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..normalization import Normalization
from .base import Architecture, Batch, Parameters, StepInput, StepOutput
from .sparse import Latents, encoded_bias, finish_gradients, fired, sparse_gradients

_SPARSE_BELOW = 1 / 16


class Standard(Architecture):
    """`f = ReLU(W_enc (x - b_dec) + b_enc)`, loss `||x - x_hat||^2 + lambda sum_i f_i ||W_dec_i||`.

    Decoder norms are free while training and folded into the encoder on saving. A young SAE fires
    nearly everywhere and runs dense; once few enough latents are active it runs sparse.
    """

    name = "standard"
    required = ("l1_coefficient",)
    unit_norm_decoder = False
    eps = 1e-8

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return decoder rows of norm 0.1 and the encoder their transpose."""
        parameters = super().initial_parameters(generator)
        parameters["W_dec"] *= 0.1
        parameters["W_enc"] *= 0.1
        return parameters

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec = batch.x, parameters["W_dec"]
        bias = encoded_bias(parameters)
        acts = step.kernels.pre_activations(batch.x_compute, step.W_enc_compute, bias).relu_()
        n_active = int(torch.count_nonzero(acts))
        penalty = (self.config.l1_coefficient or 0.0) * step.sparsity_scale
        norms = W_dec.norm(dim=1)
        by_act = norms * (penalty / len(x))
        if n_active < _SPARSE_BELOW * acts.numel():
            latents = Latents.from_dense(acts)
            values = step.kernels.grad_values(x, parameters["W_enc"], latents.indices, latents.offsets)
            values = values.add_(bias[latents.indices]).relu_()
            latents = Latents(values, latents.indices, latents.offsets)
            place = (latents.indices, latents.offsets)
            error = (step.kernels.decode(values, *place, W_dec) + parameters["b_dec"]).sub_(x)
            g = error * (2 / len(x))
            by_values = step.kernels.grad_values(g, W_dec, *place).add_(by_act[latents.indices])
            gradients = sparse_gradients(step.kernels, parameters, x, latents, g, by_values)
            act_sum = values.new_zeros(self.d_sae).index_add_(0, latents.indices, values)
            fires = fired(latents, self.d_sae)
        else:
            W_dec_compute = W_dec.to(acts.dtype)
            error = (
                torch.addmm(parameters["b_dec"], acts, W_dec_compute)
                if acts.dtype == x.dtype
                else ((acts @ W_dec_compute).to(x.dtype) + parameters["b_dec"])
            )
            error = error.sub_(x)
            g = error * (2 / len(x))
            g_compute = g.to(acts.dtype)
            by_pre_acts = (g_compute @ W_dec_compute.T).add_(by_act.to(acts.dtype)).mul_(acts > 0)
            gradients = finish_gradients(
                parameters,
                (by_pre_acts.T @ batch.x_compute).to(x.dtype),
                by_pre_acts.sum(0, dtype=x.dtype),
                (acts.T @ g_compute).to(x.dtype),
                g.sum(0),
            )
            act_sum = acts.sum(0, dtype=x.dtype)
            fires = act_sum > 0
        gradients["W_dec"].addcmul_((act_sum * (penalty / len(x)) / norms.clamp_min(1e-12))[:, None], W_dec)
        mse = float(error.square().sum()) / len(x)
        terms = {"mse_loss": mse, "l1_loss": float(act_sum @ norms) * penalty / len(x)}
        return StepOutput(gradients, fires, sum(terms.values()), mse, n_active / len(x), terms)

    def exported(self, parameters: Parameters, normalization: Normalization) -> tuple[str, dict[str, Tensor]]:
        """Fold the decoder's norms into the encoder, so that saved decoder rows have unit norm."""
        architecture, tensors = super().exported(parameters, normalization)
        norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)
        return architecture, tensors | {
            "W_enc": tensors["W_enc"] * norms,
            "b_enc": tensors["b_enc"] * norms,
            "W_dec": tensors["W_dec"] / norms[:, None],
        }
