"""TopK: the k largest pre-activations of each row (arXiv 2406.04093)."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ..config import SaeConfig
from .base import Architecture
from .contract import Batch, Number, Parameters, StepInput, StepOutput
from .parts.auxk import add_auxk
from .parts.dense import error_of, squared
from .parts.latents import SparseLatents, count, gradients_of, largest_of_rows

_WIDER = 4
# A step is captured where as many have the same k: a capture costs as much as dozens of them.
_LEAST_STEPS_ALIKE = 256


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
        error: Tensor,
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


class AnnealedTopK(TopK):
    """TopK with k-annealing, linear from d_in to k, and Multi-TopK, which adds `c L(4 k)` to the loss `L(k)`."""

    capturable = True

    @staticmethod
    def is_asked_for(config: SaeConfig) -> bool:
        """Return whether a TopK SAE's configuration uses either."""
        return bool(config.k_anneal_steps or config.multi_topk_coefficient)

    def k_at(self, steps_done: int) -> int:
        """Return the number of active latents at a step, counted from 0."""
        k, steps = int(self.config.k or 0), self.config.k_anneal_steps or 0
        start = min(self.d_in, self.d_sae)
        if steps_done >= steps or start <= k:
            return k
        return round(start + (k - start) * steps_done / steps)

    def decided_at(self, steps_done: int) -> Hashable | None:
        """Return the step's k, which its shapes follow from; None while k falls faster than captures are worth."""
        k, steps = self.k_at(steps_done), self.config.k_anneal_steps or 0
        n_values = min(self.d_in, self.d_sae) - int(self.config.k or 0)
        return k if steps_done >= steps or steps >= _LEAST_STEPS_ALIKE * n_values else None

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        k, coefficient = self.k_at(step.steps_done), self.config.multi_topk_coefficient or 0.0
        latents, gradients, error = self._reconstruct(parameters, batch, step, k)
        mse = squared(error) / len(batch.x)
        terms: dict[str, Number] = {"mse_loss": mse / step.total_variance}
        if coefficient:
            _, wider, rest = self._reconstruct(parameters, batch, step, min(_WIDER * k, self.d_sae))
            for name, gradient in gradients.items():
                gradient.add_(wider[name], alpha=coefficient)
            terms["multi_topk_loss"] = coefficient * squared(rest) / (len(batch.x) * step.total_variance)
        output = self.finish(parameters, batch, step, latents, gradients, error, terms, mse)
        if self.config.k_anneal_steps:
            output.terms["k"] = float(k)
        return output

    def _reconstruct(
        self, parameters: Parameters, batch: Batch, step: StepInput, k: int
    ) -> tuple[SparseLatents, Parameters, Tensor]:
        """Return the k largest entries of each row, the gradients of their error's mean square, and that error."""
        x, latents = batch.x, largest_of_rows(step, parameters, batch, k)
        values = latents.pre_acts.relu()
        error = (latents.decode(values, parameters["W_dec"]) + parameters["b_dec"]).sub_(x)
        g = error * (2 / (len(x) * step.total_variance))
        by_pre_acts = torch.where(values > 0, latents.grad_values(g, parameters["W_dec"]), 0)
        return latents, gradients_of(parameters, latents, x, g, values, by_pre_acts), error
