"""JumpReLU: a learned threshold per latent and a penalty on L0 (arXiv 2407.14435; Gemma Scope, 2408.05147)."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor

from ...shared.core.errors import ConfigError
from ...shared.sae import Sae
from ..stream.normalization import Normalization
from .base import check_number_of_latents
from .contract import Batch, Buffers, L0Target, Number, Parameters, StepInput, StepOutput
from .parts.dense import error_of, squared, weighted
from .parts.first_batch import exceeded_by, first_encoder_scale, unused_start
from .parts.latents import above_threshold, count, encoded_bias, gradients_of
from .penalty import PenaltyArchitecture, PenaltyConfig
from .registry import register

_BANDWIDTH = 0.001
# The bandwidth after a start at a given L0: about a third of a threshold that few latents of unit norm exceed.
_WIDE_BANDWIDTH = 0.5
_FAST_LR_SCALE = 4.0
SMALLEST_THRESHOLD = 1e-3
# Imported thresholds are at least this, because training uses their logarithms.
LEAST_IMPORTED_THRESHOLD = 1e-8

_FIRST_THRESHOLD = 0.1
_TANH_BANDWIDTH = 2.0
_TANH_SCALE = 4.0
_PRE_ACT_COEFFICIENT = 3e-6
_FIRST_ACTIVE_LATENTS = 10_000
# A little more than half: rounding to the compute dtype may move an entry across the edge of the rectangle.
EDGE = 0.51


class JumpReLUConfig(PenaltyConfig, frozen=True, kw_only=True):
    """JumpReLU: a learned threshold per latent and a penalty on L0 (arXiv 2407.14435; Gemma Scope, 2408.05147)."""

    architecture: Literal["jumprelu"] = "jumprelu"
    l0_coefficient: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(
            description="Weight of the sparsity penalty; with target_l0, that of the published penalty on the "
            "distance from it, without a controller."
        ),
    ] = None
    initial_l0: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Latents per row to fire on the first batch, which sets the thresholds; target_l0 if not given."
        ),
    ] = None
    initial_threshold: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Thresholds before training, on normalised inputs; if neither L0 is given, 0.1 with tanh, "
            "otherwise 0.001 sqrt(d_in)."
        ),
    ] = None
    bandwidth: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Width of the straight-through rectangle, on normalised inputs; if not given, 0.5 where the "
            "first batch sets the thresholds, 2 with tanh, otherwise 0.001 sqrt(d_in)."
        ),
    ] = None
    threshold_lr_scale: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Factor of the learning rate of the log thresholds; if not given, 4 where the first batch sets "
            "them, otherwise 1."
        ),
    ] = None
    sparsity_loss: Annotated[
        Literal["l0", "tanh"] | None,
        Meta(description="Penalty: l0, or tanh with the pre-activation loss; l0 if not given."),
    ] = None
    tanh_scale: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Factor of latents inside the tanh penalty; 4 if not given."),
    ] = None
    pre_act_coefficient: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="Weight of the pre-activation loss of sparsity_loss = tanh; 3e-6 if not given."),
    ] = None
    unit_norm_decoder: Annotated[
        bool | None,
        Meta(description="Hold decoder rows at unit norm, without the gradient along them."),
    ] = None

    coefficient_key: ClassVar[str | None] = "l0_coefficient"

    @property
    def name_ending(self) -> str:
        """The end of the default name: none, as in earlier releases."""
        return ""

    @property
    def uses_tanh(self) -> bool:
        """Whether the penalty is the tanh penalty."""
        return self.sparsity_loss == "tanh"

    def __post_init__(self) -> None:
        """Check the L0s, and that no key is given that has no effect."""
        super().__post_init__()
        check_number_of_latents(self, "initial_l0", self.initial_l0)
        for key, given in (("tanh_scale", self.tanh_scale), ("pre_act_coefficient", self.pre_act_coefficient)):
            if given is not None and not self.uses_tanh:
                raise ConfigError(f"'{key}' is given, but only a jumprelu SAE with sparsity_loss = 'tanh' uses it")
        if self.uses_tanh and self.target_l0 is not None:
            raise ConfigError("'target_l0' is for sparsity_loss = 'l0', and this SAE's is 'tanh'; leave one out")
        if self.initial_l0 is not None and (self.uses_tanh or self.initial_threshold is not None):
            other = "sparsity_loss = 'tanh'" if self.uses_tanh else "'initial_threshold'"
            raise ConfigError(f"{other} sets the first thresholds otherwise than 'initial_l0' does; leave one out")
        if self.uses_tanh and self.unit_norm_decoder is not None:
            raise ConfigError("sparsity_loss = 'tanh' penalises decoder norms; leave unit_norm_decoder out")


class JumpReLU(PenaltyArchitecture[JumpReLUConfig]):
    """`f = z H(z - theta)`, loss `||x - x_hat||^2 / d_out + lambda L0`, or `lambda (L0 / L0* - 1)^2` with a target.

    The thresholds learn by straight-through estimates with a rectangle of width epsilon about each:
    `df/dtheta = -(theta / epsilon) [|z - theta| < epsilon / 2]` and `dL0/dtheta = -(1 / epsilon) [same]`. The
    published epsilon and initial theta, 0.001 on inputs of unit mean square norm, are scaled to our inputs.

    With `initial_l0` or `target_l0`, the first batch sets the thresholds so that each latent fires on L0 / d_sae of it;
    epsilon is then wider and thresholds learn faster. Adam changes a logarithm by at most the learning rate per step,
    so that small thresholds could not become large within a thousand steps.
    """

    saved_as = "jumprelu"
    kind_of_wiring = None
    capturable = True
    weighs_rows = True
    resolved = (*PenaltyArchitecture.resolved, "bandwidth", "first_threshold")
    betas = (0.0, 0.999)
    eps = 1e-8
    default_lr = 7e-5
    first_coefficient = 0.02

    @property
    def unit_norm_decoder(self) -> bool:
        """Whether training holds decoder rows at unit norm; it does by default."""
        return self.config.unit_norm_decoder is not False

    @property
    def width(self) -> int:
        """The width of the rows that are read, by which the published lengths are scaled."""
        return self.d_in

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
    def l0_of_start(self) -> float | None:
        """The L0 at which training starts, where the first batch sets the thresholds."""
        return self._first_l0 if self.config.initial_threshold is None else None

    @property
    def _first_length(self) -> float:
        return _BANDWIDTH * math.sqrt(self.width) if self._first_l0 is None else _WIDE_BANDWIDTH

    @property
    def lr_scales(self) -> dict[str, float]:
        """Return the factors of the learning rate that are not 1, also of the thresholds' logarithms."""
        default = 1.0 if self._first_l0 is None else _FAST_LR_SCALE
        scale = self.config.threshold_lr_scale or default
        return super().lr_scales | ({} if scale == 1.0 else {"log_threshold": scale})

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return the base's parameters, the encoder's scaled for a given L0, and the thresholds' logarithms."""
        log_threshold = torch.full((self.d_sae,), math.log(self.first_threshold))
        parameters = super().initial_parameters(generator)
        if self.l0_of_start is not None and self.centred:
            parameters["W_enc"] *= first_encoder_scale(self.l0_of_start, self.d_sae, self.d_in)
        return parameters | {"log_threshold": log_threshold}

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Set the thresholds so that each latent fires on L0 / d_sae of the first batch, if an L0 is given."""
        if self.l0_of_start is None:
            return
        n_active = round(len(batch.x) * self.l0_of_start / self.config.d_sae)
        thresholds = exceeded_by(parameters, batch.x, n_active, self.centred) + parameters["b_enc"]
        parameters["log_threshold"].copy_(thresholds.clamp_min_(SMALLEST_THRESHOLD).log_())

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients; entries just below their threshold count for its gradient."""
        x, epsilon = batch.x, self.bandwidth
        theta = parameters["log_threshold"].exp()
        latents = above_threshold(step, parameters, batch, encoded_bias(parameters, self.centred), theta - epsilon)
        distance = latents.pre_acts - latents.spread(theta)
        active = (distance > 0) & (latents.pre_acts > 0)
        values = latents.pre_acts * active
        error = weighted(error_of(latents.decode(values, parameters["W_dec"]), parameters, batch), batch)
        g = weighted(error * (2 / (len(x) * self.d_out)), batch)
        by_values = latents.grad_values(g, parameters["W_dec"])
        gradients = gradients_of(parameters, latents, x, g, values, by_values * active, self.centred)

        l0 = step.across.mean(count(active) / len(x))
        penalty, by_l0 = self._penalty(l0, step.sparsity_scale)
        near = distance.abs() < epsilon / 2
        by_theta = -latents.sum((by_values * latents.spread(theta) + by_l0 / len(x)) * near) / epsilon
        gradients["log_threshold"] = by_theta * theta
        mse = squared(error) / len(x)
        terms: dict[str, Number] = {"mse_loss": mse / self.d_out, "l0_loss": penalty}
        return StepOutput(gradients, latents.sum(values) > 0, sum(terms.values()), mse, l0, terms)

    @property
    def l0_target(self) -> L0Target | None:
        """The target L0, unless a coefficient asks for the published penalty on the distance from it alone."""
        return super().l0_target if self.config.l0_coefficient is None else None

    @property
    def undecayed(self) -> frozenset[str]:
        """Thresholds go on following a target L0 while the other parameters settle, which changes L0."""
        return frozenset({"log_threshold"}) if self.l0_target else frozenset()

    def _penalty(self, l0: Number, scale: Number) -> tuple[Number, Number]:
        """Return the sparsity loss and its derivative with respect to L0."""
        weight, target = self.penalty_weight * scale, self.config.target_l0
        if target is None:
            return weight * l0, weight
        distance = l0 / target - 1
        if self.l0_target is None:
            return weight * distance**2, 2 * weight * distance / target
        return weight * l0 + distance**2, weight + 2 * distance / target

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Also return the thresholds, in raw activation units."""
        threshold = parameters["log_threshold"].exp() / self.latent_unit(normalization)
        return super().exported(parameters, buffers, normalization) | {"threshold": threshold}

    def imported(self, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Also return the logarithms of the thresholds; thresholds of zero or less start just above zero."""
        parameters, buffers = super().imported(sae, normalization)
        threshold = self.held(sae, normalization)["threshold"].clamp_min(LEAST_IMPORTED_THRESHOLD)
        return parameters | {"log_threshold": threshold.log()}, buffers

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Also report keys that are not used, and thresholds that are raised."""
        resamples = self.config.resample_every_tokens is not None
        threshold = None if resamples else self.config.initial_threshold
        found = super().differences(sae, normalization)
        found += unused_start(initial_l0=self.config.initial_l0, initial_threshold=threshold)
        unit, thresholds = self.latent_unit(normalization), self.held(sae, normalization)["threshold"]
        limit, n_raised = LEAST_IMPORTED_THRESHOLD / unit, int((thresholds < LEAST_IMPORTED_THRESHOLD).sum())
        if n_raised:
            found.append(
                f"{n_raised:,} of its {sae.d_sae:,} thresholds are below {limit:.1g} "
                f"(the least is {float(thresholds.min()) / unit:.3g}) and start there"
            )
        return found

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that are saved with the SAE."""
        return self._describe("l0_coefficient", "target_l0")


class TanhJumpReLU(JumpReLU):
    """`||x - x_hat||^2 + lambda sum_i tanh(c f_i ||W_dec_i||) + lambda_P sum_i ReLU(theta_i - z_i) ||W_dec_i||`.

    `f = z H(z - theta)`. The penalty's gradient reaches all parameters. Thresholds receive it through the rectangle's
    estimate for their logarithm t, `df/dt = -(exp(t) / epsilon) [|z - exp(t)| < epsilon / 2]`. The last term raises
    pre-activations that are below their threshold. It is linear there, so its gradient is that of all entries minus
    that of the active ones, and needs no dense product. Decoder norms are unconstrained, and folded on saving.
    """

    capturable = True
    weighs_rows = True
    folds_norms = True
    resolved = (*JumpReLU.resolved, "tanh_scale", "pre_act_coefficient")
    betas = (0.9, 0.999)
    default_lr = 2e-4
    sparsity_warmup_fraction = 1.0

    @property
    def unit_norm_decoder(self) -> bool:
        """Decoder norms are not constrained, because the penalty depends on them."""
        return False

    @property
    def bandwidth(self) -> float:
        """Return epsilon, in units of the normalised input."""
        return self.config.bandwidth or _TANH_BANDWIDTH

    @property
    def first_threshold(self) -> float:
        """Return the thresholds before training, in units of the normalised input."""
        return self.config.initial_threshold or _FIRST_THRESHOLD

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return decoder entries that are uniform within 1 / sqrt(d_out); the encoder is d_in / d_sae times them.

        If the widths read and written differ, the encoder's entries are drawn separately, within 1 / sqrt(d_in).
        """
        W_dec = (torch.rand(self.d_sae, self.d_out, generator=generator) * 2 - 1) / math.sqrt(self.d_out)
        W_enc = W_dec
        if self.d_in != self.d_out:
            W_enc = (torch.rand(self.d_sae, self.d_in, generator=generator) * 2 - 1) / math.sqrt(self.d_in)
        skip = {"W_skip": torch.zeros(self.d_out, self.d_in)} if self.config.wiring.skip else {}
        return {
            "W_enc": W_enc * min(1.0, self.d_in / self.d_sae),
            "b_enc": torch.zeros(self.d_sae),
            "W_dec": W_dec,
            "b_dec": torch.zeros(self.d_out),
            **skip,
            "log_threshold": torch.full((self.d_sae,), math.log(self.first_threshold)),
        }

    def n_first_rows(self, n_rows: int) -> int:
        """Return on how many rows of the first batch each latent fires."""
        return min(round(n_rows * _FIRST_ACTIVE_LATENTS / self.d_sae), n_rows // 2)

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Set the encoder's biases so that each latent fires on 10,000 / d_sae of the first batch, at most on half."""
        lowest = exceeded_by(parameters, batch.x, self.n_first_rows(len(batch.x)), self.centred)
        parameters["b_enc"].copy_(parameters["log_threshold"].exp() - lowest)

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec, rows = batch.x, parameters["W_dec"], len(batch.x)
        epsilon, scale = self.bandwidth, self.tanh_scale
        theta, bias = parameters["log_threshold"].exp(), encoded_bias(parameters, self.centred)
        decoder_norms = self.decoder_norms(W_dec)
        norms = decoder_norms.sums
        latents = above_threshold(step, parameters, batch, bias, theta - EDGE * epsilon)
        distance = latents.pre_acts - latents.spread(theta)
        active = distance > 0
        values, weights = latents.pre_acts * active, latents.spread(norms)
        error = weighted(error_of(latents.decode(values, W_dec), parameters, batch), batch)
        g = weighted(error * (2 / rows), batch)

        squashed = torch.tanh(values * weights * scale)
        penalty = self.penalty_weight * step.sparsity_scale / rows
        slope = (1 - squashed.square()) * (scale * penalty)
        by_values = latents.grad_values(g, W_dec) + slope * weights
        by_log_threshold = -latents.sum(by_values * (distance.abs() < epsilon / 2)) * theta / epsilon
        by_norms = latents.sum(slope * values)

        pull = self.pre_act_coefficient / rows
        by_pre_acts = (by_values + weights * pull) * active
        gradients = gradients_of(parameters, latents, x, g, values, by_pre_acts, self.centred)
        # The terms below a threshold are those of all rows minus those of the rows where the latent is active.
        sum_x = x.sum(0)
        below = rows * (theta - bias) - parameters["W_enc"] @ sum_x + latents.sum(distance * active)
        by_bias = norms * (-pull * rows)
        gradients["b_enc"] += by_bias
        if self.centred:
            gradients["W_enc"].addr_(norms * -pull, sum_x - rows * parameters["b_dec"])
            gradients["b_dec"] -= parameters["W_enc"].T @ by_bias
        else:
            gradients["W_enc"].addr_(norms * -pull, sum_x)
        by_log_threshold += (rows - latents.sum(active.to(values.dtype))) * norms * pull * theta
        gradients["log_threshold"] = by_log_threshold
        by_norms = by_norms + below * pull
        decoder_norms.add_gradient(gradients["W_dec"], W_dec, by_norms, fused=self.centred)

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

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Fold the decoder's norms into the encoder and the thresholds."""
        return self.fold(super().exported(parameters, buffers, normalization))


@register(JumpReLUConfig)
def make_jumprelu(config: JumpReLUConfig, d_in: int, d_out: int | None = None) -> JumpReLU:
    """Return the architecture with a penalty on L0, or with the tanh penalty."""
    return (TanhJumpReLU if config.uses_tanh else JumpReLU)(config, d_in, d_out)
