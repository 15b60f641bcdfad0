"""JumpReLU with a tanh penalty and a loss that revives silent latents (Anthropic, January 2025 update)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..stream.normalization import Normalization
from .contract import Batch, Buffers, Number, Parameters, StepInput, StepOutput
from .jumprelu import JumpReLU
from .parts.dense import squared
from .parts.first_batch import exceeded_by
from .parts.latents import above_threshold, count, encoded_bias, gradients_of
from .standard import fold_decoder_norms

_FIRST_THRESHOLD = 0.1
_BANDWIDTH = 2.0
_TANH_SCALE = 4.0
_PRE_ACT_COEFFICIENT = 3e-6
_FIRST_ACTIVE_LATENTS = 10_000
# The rectangle's edge is looked for a little outside, where rounding to the compute dtype may have put it.
_EDGE = 0.51


class TanhJumpReLU(JumpReLU):
    """`||x - x_hat||^2 + lambda sum_i tanh(c f_i ||W_dec_i||) + lambda_P sum_i ReLU(theta_i - z_i) ||W_dec_i||`.

    `f = z H(z - theta)`. The penalty's gradient reaches all parameters, the thresholds through the rectangle's
    estimate by their logarithm t, `df/dt = -(exp(t) / epsilon) [|z - exp(t)| < epsilon / 2]`. The last term pulls the
    pre-activations below their threshold up; as it is linear there, its gradient is that of all entries less that of
    the active ones, and costs no dense product. Decoder norms are free and folded on saving.
    """

    capturable = True
    resolved = (*JumpReLU.resolved, "tanh_scale", "pre_act_coefficient")
    unit_norm_decoder = False
    betas = (0.9, 0.999)
    default_lr = 2e-4
    sparsity_warmup_fraction = 1.0

    @staticmethod
    def is_asked_for(config: object) -> bool:
        """Return whether a JumpReLU SAE's configuration names this loss."""
        return getattr(config, "sparsity_loss", None) == "tanh"

    @property
    def bandwidth(self) -> float:
        """Return epsilon, in units of the normalised input."""
        return self.config.bandwidth or _BANDWIDTH

    @property
    def first_threshold(self) -> float:
        """Return the thresholds before training, in units of the normalised input."""
        return self.config.initial_threshold or _FIRST_THRESHOLD

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return decoder entries uniform within 1 / sqrt(d_in), and d_in / d_sae times them as the encoder."""
        W_dec = (torch.rand(self.d_sae, self.d_in, generator=generator) * 2 - 1) / math.sqrt(self.d_in)
        return {
            "W_enc": W_dec * min(1.0, self.d_in / self.d_sae),
            "b_enc": torch.zeros(self.d_sae),
            "W_dec": W_dec,
            "b_dec": torch.zeros(self.d_in),
            "log_threshold": torch.full((self.d_sae,), math.log(self.first_threshold)),
        }

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Set the encoder's biases so that each latent fires on 10,000 / d_sae of the first batch, at most on half."""
        rows = len(batch.x)
        n_active = min(round(rows * _FIRST_ACTIVE_LATENTS / self.d_sae), rows // 2)
        lowest = exceeded_by(parameters, batch.x, n_active)
        parameters["b_enc"].copy_(parameters["log_threshold"].exp() - lowest)

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec, rows = batch.x, parameters["W_dec"], len(batch.x)
        epsilon, scale = self.bandwidth, self.tanh_scale
        theta, bias, norms = parameters["log_threshold"].exp(), encoded_bias(parameters), W_dec.norm(dim=1)
        latents = above_threshold(step, parameters, batch, bias, theta - _EDGE * epsilon)
        distance = latents.pre_acts - latents.spread(theta)
        active = distance > 0
        values, weights = latents.pre_acts * active, latents.spread(norms)
        error = (latents.decode(values, W_dec) + parameters["b_dec"]).sub_(x)
        g = error * (2 / rows)

        squashed = torch.tanh(values * weights * scale)
        penalty = (self.config.l0_coefficient or 0.0) * step.sparsity_scale / rows
        slope = (1 - squashed.square()) * (scale * penalty)
        by_values = latents.grad_values(g, W_dec) + slope * weights
        by_log_threshold = -latents.sum(by_values * (distance.abs() < epsilon / 2)) * theta / epsilon
        by_norms = latents.sum(slope * values)

        pull = self.pre_act_coefficient / rows
        gradients = gradients_of(parameters, latents, x, g, values, (by_values + weights * pull) * active)
        # Each latent's terms below its threshold are those of all rows less those of the rows where it is active.
        sum_x = x.sum(0)
        below = rows * (theta - bias) - parameters["W_enc"] @ sum_x + latents.sum(distance * active)
        by_bias = norms * (-pull * rows)
        gradients["W_enc"].addr_(norms * -pull, sum_x - rows * parameters["b_dec"])
        gradients["b_enc"] += by_bias
        gradients["b_dec"] -= parameters["W_enc"].T @ by_bias
        by_log_threshold += (rows - latents.sum(active.to(values.dtype))) * norms * pull * theta
        gradients["log_threshold"] = by_log_threshold
        by_norms = by_norms + below * pull
        gradients["W_dec"].addcmul_((by_norms / norms.clamp_min(1e-12))[:, None], W_dec)

        mse = squared(error) / rows
        terms: dict[str, Number] = {
            "mse_loss": mse,
            "sparsity_loss": latents.sum(squashed).sum().double() * penalty,
            "pre_act_loss": (below @ norms).double() * pull,
        }
        return StepOutput(gradients, latents.sum(values) > 0, sum(terms.values()), mse, count(active) / rows, terms)

    @property
    def tanh_scale(self) -> float:
        """Return the factor of latents inside the penalty."""
        return self.config.tanh_scale or _TANH_SCALE

    @property
    def pre_act_coefficient(self) -> float:
        """Return the weight of the loss of pre-activations below their threshold."""
        given = self.config.pre_act_coefficient
        return _PRE_ACT_COEFFICIENT if given is None else given

    def exported(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization
    ) -> tuple[str, dict[str, Tensor]]:
        """Fold the decoder's norms into the encoder and the thresholds."""
        architecture, tensors = super().exported(parameters, buffers, normalization)
        return architecture, fold_decoder_norms(tensors)
