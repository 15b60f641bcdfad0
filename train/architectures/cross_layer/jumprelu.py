"""Cross-layer transcoders with JumpReLU: a penalty on L0, or the published tanh penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...stream.normalization import Normalization
from ..contract import Batch, Buffers, Number, Parameters, StepInput, StepOutput
from ..jumprelu import EDGE, LEAST_IMPORTED_THRESHOLD, SMALLEST_THRESHOLD, JumpReLU, JumpReLUConfig, TanhJumpReLU
from ..parts.first_batch import PUBLISHED_NORM, first_encoder_scale, unused_start
from ..parts.latents import Latents, count
from ..registry import register
from .base import CrossLayer
from .layers import LayerInput, entries_above, squared_errors


class CrossLayerJumpReLU(CrossLayer[JumpReLUConfig], JumpReLU):
    """`f_l = z_l H(z_l - theta_l)`, loss `sum_m ||y_m - y_hat_m||^2 / d_out + lambda L0`, or with a target L0.

    L0 counts the latents of all layers, and `d_out` is the width of one target, so that a layer has the same weight as
    in a separate transcoder. Thresholds are trained as in `JumpReLU`.
    """

    activation = "jumprelu"

    @property
    def width(self) -> int:
        """The width of a layer's input, by which the published bandwidth and initial threshold are scaled."""
        return self.layers.d_in

    @property
    def first_norm(self) -> float:
        """The norm of a latent's decoders before training: one where the first batch sets the thresholds."""
        return PUBLISHED_NORM if self.l0_of_start is None else 1.0

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return the base's parameters, the encoder's scaled for a given L0, and the thresholds' logarithms."""
        parameters, layers = super().initial_parameters(generator), self.layers
        if self.l0_of_start is not None:
            parameters["W_enc"] *= first_encoder_scale(self.l0_of_start / layers.n, layers.d_sae, layers.d_in)
        return parameters | {"log_threshold": torch.full((self.d_sae,), math.log(self.first_threshold))}

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Set the thresholds so that each latent fires on L0 / d_sae of the first batch, if an L0 is given."""
        if self.l0_of_start is None:
            return
        n_active = round(len(batch.x) * self.l0_of_start / self.d_sae)
        thresholds = self.exceeded_by(parameters, batch, n_active) + parameters["b_enc"]
        parameters["log_threshold"].copy_(thresholds.clamp_min_(SMALLEST_THRESHOLD).log_())

    def thresholds(self, parameters: Parameters, buffers: Buffers) -> Float[Tensor, " all_latents"]:
        """Return the thresholds."""
        return parameters["log_threshold"].exp()

    def with_thresholds(
        self, parameters: Parameters, threshold: Float[Tensor, " all_latents"] | None
    ) -> tuple[Parameters, Buffers]:
        """Also return the thresholds' logarithms; thresholds of zero or less start just above zero."""
        assert threshold is not None
        return parameters | {"log_threshold": threshold.clamp_min(LEAST_IMPORTED_THRESHOLD).log()}, {}

    def differences(self, sae: Any, normalization: Normalization) -> list[str]:
        """Also report keys that are not used."""
        config = self.config
        unused = unused_start(initial_l0=config.initial_l0, initial_threshold=config.initial_threshold)
        return super().differences(sae, normalization) + unused

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients; entries just below their threshold count for its gradient."""
        layers, y, epsilon = self.layers, batch.x if batch.target is None else batch.target, self.bandwidth
        inputs, theta = layers.inputs(parameters, batch, step), parameters["log_threshold"].exp()
        latents, distances, values = self._select(inputs, step, theta, epsilon)
        errors = layers.errors(latents, values, parameters["W_dec"], parameters["b_dec"], y)
        scale = 2 / (len(y) * layers.d_out)
        g = [error * scale for error in errors]
        n_active = torch.stack([count(acts > 0) for acts in values]).sum()
        l0 = step.across.mean(n_active / len(y))
        penalty, by_l0 = self._penalty(l0, step.sparsity_scale)
        by_pre_acts, by_theta = [], []
        for i, (some, distance, acts) in enumerate(zip(latents, distances, values, strict=True)):
            by_values = layers.grad_values(i, some, g, parameters["W_dec"])
            own = some.spread(theta[layers.latents(i)])
            near = distance.abs() < epsilon / 2
            by_theta.append(-some.sum((by_values * own + by_l0 / len(y)) * near) / epsilon)
            by_pre_acts.append(by_values * (acts > 0))
        gradients = layers.gradients_of(parameters, inputs, latents, g, values, by_pre_acts)
        gradients["log_threshold"] = torch.cat(by_theta) * theta
        mse = squared_errors(errors) / len(y)
        terms: dict[str, Number] = {"mse_loss": mse / layers.d_out, "l0_loss": penalty}
        return StepOutput(gradients, _fired(latents, values), sum(terms.values()), mse, l0, terms)

    def _select(
        self, inputs: Sequence[LayerInput], step: StepInput, theta: Float[Tensor, " all_latents"], margin: float
    ) -> tuple[list[Latents], list[Tensor], list[Tensor]]:
        """Return each layer's entries above `theta - margin`, their distances from theta, and their values."""
        latents, distances, values = [], [], []
        for i, one in enumerate(inputs):
            own = theta[self.layers.latents(i)]
            some = entries_above(one, step, own - margin)
            distance = some.pre_acts - some.spread(own)
            latents.append(some)
            distances.append(distance)
            values.append(some.pre_acts * ((distance > 0) & (some.pre_acts > 0)))
        return latents, distances, values


class CrossLayerTanhJumpReLU(CrossLayerJumpReLU, TanhJumpReLU):
    """The loss of "Circuit Tracing", `sum_m ||y_m - y_hat_m||^2 + lambda sum_i tanh(c f_i ||W_dec_i||)`.

    `W_dec_i` are a latent's decoders for all its targets, concatenated. The pre-activation loss of `TanhJumpReLU`,
    `lambda_P sum_i ReLU(theta_i - z_i) ||W_dec_i||`, is added; the thresholds' gradients are also described there.
    """

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Set the biases so that 10,000 latents of all layers, at most half, fire per row of the first batch."""
        lowest = self.exceeded_by(parameters, batch, self.n_first_rows(len(batch.x)))
        parameters["b_enc"].copy_(parameters["log_threshold"].exp() - lowest)

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        layers, y, W_dec = self.layers, batch.x if batch.target is None else batch.target, parameters["W_dec"]
        rows, epsilon, c = len(y), self.bandwidth, self.tanh_scale
        inputs, theta = layers.inputs(parameters, batch, step), parameters["log_threshold"].exp()
        norms = layers.decoder_norms(W_dec)
        latents, distances, values = self._select(inputs, step, theta, EDGE * epsilon)
        errors = layers.errors(latents, values, W_dec, parameters["b_dec"], y)
        scale = 2 / rows
        g = [error * scale for error in errors]
        penalty = self.penalty_weight * step.sparsity_scale / rows
        pull = self.pre_act_coefficient / rows

        by_pre_acts, by_log_threshold, by_norms, below, penalised = [], [], [], [], []
        for i, (some, distance, acts) in enumerate(zip(latents, distances, values, strict=True)):
            own = layers.latents(i)
            active, weights = acts > 0, some.spread(norms[own])
            squashed = torch.tanh(acts * weights * c)
            slope = (1 - squashed.square()) * (c * penalty)
            by_values = layers.grad_values(i, some, g, W_dec) + slope * weights
            near = distance.abs() < epsilon / 2
            by_log_threshold.append(-some.sum(by_values * near) * theta[own] / epsilon)
            by_norms.append(some.sum(slope * acts))
            by_pre_acts.append((by_values + weights * pull) * active)
            # The terms below a threshold are those of all rows minus those of the rows where the latent is active.
            sum_x = inputs[i].x.sum(0)
            every = rows * (theta[own] - parameters["b_enc"][own]) - parameters["W_enc"][own] @ sum_x
            below.append(every + some.sum(distance * active))
            penalised.append(some.sum(squashed).sum().double())
        gradients = layers.gradients_of(parameters, inputs, latents, g, values, by_pre_acts)
        pre_act_loss = torch.cat(below)
        n_below = torch.cat(
            [rows - some.sum((acts > 0).to(acts.dtype)) for some, acts in zip(latents, values, strict=True)]
        )
        for i, one in enumerate(inputs):
            gradients["W_enc"][layers.latents(i)].addr_(norms[layers.latents(i)] * -pull, one.x.sum(0))
        gradients["b_enc"] -= norms * (pull * rows)
        gradients["log_threshold"] = torch.cat(by_log_threshold) + n_below * norms * pull * theta
        by_norm = torch.cat(by_norms) + pre_act_loss * pull
        gradients["W_dec"] += layers.scale_decoders(W_dec, by_norm / norms.clamp_min(1e-12))
        mse = squared_errors(errors) / rows
        terms: dict[str, Number] = {
            "mse_loss": mse,
            "sparsity_loss": torch.stack(penalised).sum() * penalty,
            "pre_act_loss": (pre_act_loss @ norms).double() * pull,
        }
        n_active = torch.stack([count(acts > 0) for acts in values]).sum()
        return StepOutput(gradients, _fired(latents, values), sum(terms.values()), mse, n_active / rows, terms)


def _fired(latents: Sequence[Latents], values: Sequence[Tensor]) -> Tensor:
    return torch.cat([some.sum(acts) for some, acts in zip(latents, values, strict=True)]) > 0


@register(JumpReLUConfig, cross_layer=True)
def make_cross_layer_jumprelu(config: JumpReLUConfig, d_in: int, d_out: int | None = None) -> CrossLayerJumpReLU:
    """Return the architecture with a penalty on L0, or with the tanh penalty."""
    return (CrossLayerTanhJumpReLU if config.uses_tanh else CrossLayerJumpReLU)(config, d_in, d_out)
