"""Standard with p-annealing: the penalty nears L0 while training (arXiv 2408.00113)."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Batch, Buffers, Number, Parameters, StepInput, StepOutput
from .parts.dense import squared
from .parts.latents import above_threshold, count, encoded_bias, gradients_of
from .standard import Standard

_EPSILON = 1e-3


class PAnnealed(Standard):
    """Standard with the penalty `lambda s sum_i (f_i ||W_dec_i||)^p`, p falling linearly from 1 to `p_final`.

    Whenever p changes, s is multiplied by the old penalty over the new, so that only its shape changes. Powers are
    `(a + 0.001)^p - 0.001^p`, whose slope at zero is finite.
    """

    capturable = True

    def initial_buffers(self) -> Buffers:
        """Return p and the penalty's scale."""
        return {"p": torch.tensor(1.0), "penalty_scale": torch.tensor(1.0)}

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec = batch.x, parameters["W_dec"]
        latents = above_threshold(step, parameters, batch, encoded_bias(parameters))
        values = latents.pre_acts.relu()
        active = values > 0
        norms = W_dec.norm(dim=1)
        weighted = values * latents.spread(norms)
        p, scale = self._anneal(weighted, step)
        penalty = (self.config.l1_coefficient or 0.0) * step.sparsity_scale * scale / len(x)
        slope = (weighted + _EPSILON).pow_(p - 1).mul_(p * penalty).mul_(active)
        error = (latents.decode(values, W_dec) + parameters["b_dec"]).sub_(x)
        g = error * (2 / len(x))
        by_values = latents.grad_values(g, W_dec).addcmul_(slope, latents.spread(norms).expand_as(slope))
        gradients = gradients_of(parameters, latents, x, g, values, by_values.mul_(active))
        by_norm = latents.sum(slope * values)
        gradients["W_dec"].addcmul_((by_norm / norms.clamp_min(1e-12))[:, None], W_dec)
        mse = squared(error) / len(x)
        terms: dict[str, Number] = {"mse_loss": mse, "sparsity_loss": _power_sum(weighted, p) * penalty}
        return StepOutput(gradients, latents.sum(values) > 0, sum(terms.values()), mse, count(active) / len(x), terms)

    def _anneal(self, weighted: Tensor, step: StepInput) -> tuple[Tensor, Tensor]:
        """Bring p to the step's and return it with the penalty's scale, both on the device."""
        p, scale = step.buffers["p"], step.buffers["penalty_scale"]
        done = p.new_full((), step.steps_done) if step.step_number is None else step.step_number
        share = (done.double() / (self.config.p_anneal_steps or 1)).clamp(max=1)
        new = 1 + ((self.config.p_final or 1.0) - 1) * share
        before, after = (step.across.mean(_power_sum(weighted, power)) for power in (p.double(), new))
        scale.mul_(torch.where((before > 0) & (after > 0), before / after, 1))
        p.copy_(new)
        return p, scale


def _power_sum(weighted: Tensor, p: Tensor) -> Tensor:
    """Return the sum of the powers; what is zero, as room that no entry takes is, adds nothing even by rounding."""
    powers = (weighted + _EPSILON).pow_(p).sub_(_EPSILON**p)
    return powers.mul_(weighted > 0).sum(dtype=torch.float64)
