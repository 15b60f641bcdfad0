"""JumpReLU: a learned threshold per latent and a penalty on L0 (arXiv 2407.14435; Gemma Scope, 2408.05147)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..stream.normalization import Normalization
from .base import Architecture
from .contract import Batch, Buffers, Number, Parameters, StepInput, StepOutput
from .parts.dense import squared
from .parts.first_batch import exceeded_by
from .parts.latents import above_threshold, count, encoded_bias, gradients_of

_BANDWIDTH = 0.001
# From a start at a given L0: this is about a third of a threshold that few latents of unit norm pass.
_WIDE_BANDWIDTH = 0.5
_FAST_LR_SCALE = 4.0
_SMALLEST_THRESHOLD = 1e-3


class JumpReLU(Architecture):
    """`f = z H(z - theta)`, loss `||x - x_hat||^2 / d_in + lambda L0`, or `lambda (L0 / L0* - 1)^2` with a target.

    The thresholds learn by straight-through estimates with a rectangle of width epsilon about each:
    `df/dtheta = -(theta / epsilon) [|z - theta| < epsilon / 2]` and `dL0/dtheta = -(1 / epsilon) [same]`. The
    published epsilon and first theta, 0.001 on inputs of unit mean square norm, are scaled to ours.

    With `initial_l0`, or else a target, the first batch sets the thresholds, so that each latent fires on L0 / d_sae of
    it, epsilon is wide and thresholds learn faster: by Adam a logarithm moves at most by the learning rate a step, and
    a run of a thousand steps would end before small thresholds were large.
    """

    name = "jumprelu"
    capturable = True
    required = ("l0_coefficient",)
    options = (
        "sparsity_warmup_steps",
        "unit_norm_decoder",
        "target_l0",
        "initial_l0",
        "sparsity_loss",
        "tanh_scale",
        "pre_act_coefficient",
        "bandwidth",
        "initial_threshold",
        "threshold_lr_scale",
    )
    resolved = (*Architecture.resolved, "bandwidth", "first_threshold")
    betas = (0.0, 0.999)
    eps = 1e-8
    revives_dead = False
    default_lr = 7e-5

    @property
    def bandwidth(self) -> float:
        """Return epsilon, in units of the normalised input."""
        return self.config.bandwidth or self._first_length

    @property
    def first_threshold(self) -> float:
        """Return the thresholds before training, or of resampled latents, in units of the normalised input."""
        return self.config.initial_threshold or self._first_length

    @property
    def _first_l0(self) -> float | None:
        return self.config.initial_l0 or self.config.target_l0

    @property
    def _first_length(self) -> float:
        return _BANDWIDTH * math.sqrt(self.d_in) if self._first_l0 is None else _WIDE_BANDWIDTH

    @property
    def lr_scales(self) -> dict[str, float]:
        """Return the factor of the thresholds' learning rate, where it is not one."""
        default = 1.0 if self._first_l0 is None else _FAST_LR_SCALE
        scale = self.config.threshold_lr_scale or default
        return {} if scale == 1.0 else {"log_threshold": scale}

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return the base's parameters and the thresholds' logarithms."""
        log_threshold = torch.full((self.d_sae,), math.log(self.first_threshold))
        return super().initial_parameters(generator) | {"log_threshold": log_threshold}

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Set the thresholds so that each latent fires on L0 / d_sae of the first batch, where an L0 is given."""
        if self._first_l0 is None or self.config.initial_threshold is not None:
            return
        n_active = round(len(batch.x) * self._first_l0 / self.config.d_sae)
        thresholds = exceeded_by(parameters, batch.x, n_active) + parameters["b_enc"]
        parameters["log_threshold"].copy_(thresholds.clamp_min_(_SMALLEST_THRESHOLD).log_())

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients; entries just below their threshold count for its gradient."""
        x, epsilon = batch.x, self.bandwidth
        theta = parameters["log_threshold"].exp()
        latents = above_threshold(step, parameters, batch, encoded_bias(parameters), theta - epsilon)
        distance = latents.pre_acts - latents.spread(theta)
        active = (distance > 0) & (latents.pre_acts > 0)
        values = latents.pre_acts * active
        error = (latents.decode(values, parameters["W_dec"]) + parameters["b_dec"]).sub_(x)
        g = error * (2 / (len(x) * self.d_in))
        by_values = latents.grad_values(g, parameters["W_dec"])
        gradients = gradients_of(parameters, latents, x, g, values, by_values * active)

        l0 = step.across.mean(count(active) / len(x))
        penalty, by_l0 = self._penalty(l0, step.sparsity_scale)
        near = distance.abs() < epsilon / 2
        by_theta = -latents.sum((by_values * latents.spread(theta) + by_l0 / len(x)) * near) / epsilon
        gradients["log_threshold"] = by_theta * theta
        mse = squared(error) / len(x)
        terms: dict[str, Number] = {"mse_loss": mse / self.d_in, "l0_loss": penalty}
        return StepOutput(gradients, latents.sum(values) > 0, sum(terms.values()), mse, l0, terms)

    def _penalty(self, l0: Number, scale: Number) -> tuple[Number, Number]:
        """Return the sparsity loss and its derivative by L0."""
        weight, target = (self.config.l0_coefficient or 0.0) * scale, self.config.target_l0
        if target is None:
            return weight * l0, weight
        return weight * (l0 / target - 1) ** 2, 2 * weight * (l0 / target - 1) / target

    def exported(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization
    ) -> tuple[str, dict[str, Tensor]]:
        """Add the thresholds, in raw activation units."""
        architecture, tensors = super().exported(parameters, buffers, normalization)
        return architecture, tensors | {"threshold": parameters["log_threshold"].exp() / normalization.scale}
