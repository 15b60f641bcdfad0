"""TopK: the k largest pre-activations of each row (arXiv 2406.04093)."""

from __future__ import annotations

import torch

from .base import Architecture
from .contract import Batch, Number, Parameters, StepInput, StepOutput
from .parts.auxk import add_auxk
from .parts.dense import error_of, squared
from .parts.latents import SparseLatents, count, gradients_of, largest_of_rows


class TopK(Architecture):
    """`f = ReLU(TopK(W_enc (x - b_dec) + b_enc))`, loss `||x - x_hat||^2 / Var(x)` and AuxK.

    The k latents of a row are chosen from a product in the compute dtype, their values then computed in the
    parameters' own precision; or both in that precision, where that takes less time (see `largest_of_rows`).
    """

    name = "topk"
    capturable = True
    required = ("k",)
    options = ("aux_coefficient", "k_aux", "unit_norm_decoder", "k_anneal_steps", "multi_topk_coefficient")

    resolved = (*Architecture.resolved, "aux_coefficient", "k_aux")

    @property
    def k_aux(self) -> int:
        """Return how many dead latents of each row the auxiliary loss uses; d_in / 2 if not given."""
        return self.config.k_aux or max(1, self.d_in // 2)

    def select(self, parameters: Parameters, batch: Batch, step: StepInput) -> SparseLatents:
        """Return the chosen entries, positive or not."""
        return largest_of_rows(step, parameters, batch, int(self.config.k or 0))

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, latents = batch.x, self.select(parameters, batch, step)
        values = latents.pre_acts.relu()
        W_dec = parameters["W_dec"] if step.W_dec_compute is None else step.W_dec_compute
        decoded = step.across.over_latents(latents.decode(values, W_dec))
        error = error_of(decoded, parameters["b_dec"], x)
        mse = squared(error) / len(x)
        scale = 2 / (len(x) * step.total_variance)
        by_pre_acts = torch.where(values > 0, latents.grad_values(error, parameters["W_dec"]).mul_(scale), 0)
        x_compute = None if step.W_dec_compute is None else batch.x_compute
        gradients = gradients_of(parameters, latents, x, error, values, by_pre_acts, step.across, x_compute, scale)
        terms: dict[str, Number] = {"mse_loss": mse / step.total_variance}
        return self.finish(parameters, batch, step, latents, gradients, error, terms, mse)

    def finish(
        self,
        parameters: Parameters,
        batch: Batch,
        step: StepInput,
        latents: SparseLatents,
        gradients: Parameters,
        error: torch.Tensor,
        terms: dict[str, Number],
        mse: Number,
    ) -> StepOutput:
        """Add AuxK where latents are dead, and note which latents fired."""
        if step.dead is not None and self.aux_coefficient > 0:
            terms["auxk_loss"] = add_auxk(
                gradients,
                parameters,
                batch,
                step.W_enc_compute,
                error,
                step.dead,
                self.k_aux,
                self.aux_coefficient,
                step.across,
                step.n_dead,
            )
        l0 = step.across.over_latents(count(latents.pre_acts > 0)) / len(batch.x)
        return StepOutput(gradients, latents.fired(), sum(terms.values()), mse, l0, terms)
