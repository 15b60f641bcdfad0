"""TopK: the k largest pre-activations of each row (arXiv 2406.04093)."""

from __future__ import annotations

from .auxk import add_auxk
from .base import Architecture, Batch, Parameters, StepInput, StepOutput
from .sparse import Latents, encoded_bias, fired, sparse_gradients


class TopK(Architecture):
    """`f = ReLU(TopK(W_enc (x - b_dec) + b_enc))`, loss `||x - x_hat||^2 / Var(x)` and AuxK.

    The k latents of a row are chosen from a product in the compute dtype; their values are then
    computed in the parameters' own precision.
    """

    name = "topk"
    required = ("k",)

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        kernels, x = step.kernels, batch.x
        bias = encoded_bias(parameters)
        _, top_indices = kernels.select_topk(batch.x_compute, step.W_enc_compute, bias, self.config.k)
        latents = Latents.from_topk(top_indices.new_empty(top_indices.shape).to(x.dtype), top_indices)
        values = kernels.grad_values(x, parameters["W_enc"], latents.indices, latents.offsets)
        values = values.add_(bias[latents.indices]).relu_()
        latents = Latents(values, latents.indices, latents.offsets)

        x_hat = kernels.decode(values, latents.indices, latents.offsets, parameters["W_dec"]) + parameters["b_dec"]
        error = x_hat.sub_(x)
        squared = float(error.square().sum())
        g = error * (2 / (len(x) * step.total_variance))
        by_values = kernels.grad_values(g, parameters["W_dec"], latents.indices, latents.offsets)
        gradients = sparse_gradients(kernels, parameters, x, latents, g, by_values)
        mse = squared / len(x)
        terms = {"mse_loss": mse / step.total_variance}
        if step.dead is not None and self.config.aux_coefficient > 0:
            k_aux = self.config.k_aux or self.d_in // 2
            terms["auxk_loss"] = add_auxk(
                gradients, parameters, x, -error, step.dead, k_aux, self.config.aux_coefficient
            )
        l0 = float((values > 0).sum()) / len(x)
        return StepOutput(gradients, fired(latents, self.d_sae), sum(terms.values()), mse, l0, terms)
