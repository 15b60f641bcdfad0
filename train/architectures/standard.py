"""Standard: ReLU and an L1 penalty weighted by decoder norms (Anthropic, April 2024 update)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from msgspec import Meta
from torch import Tensor

from ...shared.core.errors import ConfigError
from ..stream.normalization import Normalization
from .contract import Batch, Buffers, L0Target, Number, Parameters, StepInput, StepOutput
from .parts.dense import error_of, squared
from .parts.first_batch import PUBLISHED_NORM, exceeded_by
from .parts.latents import above_threshold, count, encoded_bias, gradients_of
from .penalty import PenaltyArchitecture, PenaltyConfig
from .registry import register

_EPSILON = 1e-3
_LEAST_COEFFICIENT = 0.1  # that a controller keeps, for rows of norm one
_NORM_AT_WIDTH = 0.15  # with a target L0 of d_in; measured in docs/recipes.md


class L1Config(PenaltyConfig, frozen=True, kw_only=True):
    """Configuration of an architecture with an L1 penalty weighted by decoder norms."""

    l1_coefficient: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="Weight of the L1 penalty; with target_l0, where the controller starts."),
    ] = None

    coefficient_key: ClassVar[str | None] = "l1_coefficient"


class StandardConfig(L1Config, frozen=True, kw_only=True):
    """Standard: ReLU and an L1 penalty weighted by decoder norms (Anthropic, April 2024 update)."""

    architecture: Literal["standard"] = "standard"
    p_final: Annotated[
        Annotated[float, Meta(gt=0, lt=1)] | None,
        Meta(description="Power of the penalty at the end of p-annealing; it stays L1 if not given."),
    ] = None
    p_anneal_steps: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Steps over which the power falls from 1 to p_final; required with it."),
    ] = None

    def __post_init__(self) -> None:
        """Check that p-annealing has both of its keys."""
        super().__post_init__()
        if (self.p_final is None) != (self.p_anneal_steps is None):
            raise ConfigError("p-annealing needs both 'p_final' and 'p_anneal_steps'; give both or neither")


S = TypeVar("S", bound=L1Config)


class Standard(PenaltyArchitecture[S]):
    """`f = ReLU(W_enc (x - b_dec) + b_enc)`, loss `||x - x_hat||^2 + lambda sum_i f_i ||W_dec_i||`.

    Decoder norms are not constrained in training, and are folded into the encoder on saving.
    """

    saved_as = "standard"
    kind_of_wiring = None
    folds_norms = True
    capturable = True
    eps = 1e-8

    @property
    def unit_norm_decoder(self) -> bool:
        """Decoder norms are not constrained, because the penalty depends on them."""
        return False

    @property
    def first_norm(self) -> float:
        """The norm of decoder and encoder rows before training: with a target L0, `.15 d_in / target_l0`, at most one.

        Small rows leave their random start soon, but where few latents fire, they would have to grow under the penalty,
        and many would die. Without a target it is the published 0.1.
        """
        target = self.config.target_l0
        return PUBLISHED_NORM if target is None else min(1.0, _NORM_AT_WIDTH * self.d_in / target)

    @property
    def l0_target(self) -> L0Target | None:
        """The target L0, if one is given, and a controller that becomes stricter as the learning rate falls."""
        target = super().l0_target
        return target and target._replace(gain=30.0, last_gain=90.0, least_factor=_LEAST_COEFFICIENT * self.first_norm)

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Set the encoder's biases so that each latent fires on target_l0 / d_sae of the first batch, with a target."""
        if self.config.target_l0 is not None:
            n_active = round(len(batch.x) * self.config.target_l0 / self.d_sae)
            parameters["b_enc"].copy_(-exceeded_by(parameters, batch.x, n_active, self.centred))

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec = batch.x, parameters["W_dec"]
        latents = above_threshold(step, parameters, batch, encoded_bias(parameters, self.centred))
        values = latents.pre_acts.relu()
        active = values > 0
        penalty = self.penalty_weight * step.sparsity_scale / len(x)
        decoder_norms = self.decoder_norms(W_dec)
        norms = decoder_norms.sums
        error = error_of(latents.decode(values, W_dec), parameters, batch)
        g = error * (2 / len(x))
        by_values = latents.grad_values(g, W_dec).add_(latents.spread(norms * penalty))
        gradients = gradients_of(parameters, latents, x, g, values, by_values.mul_(active), self.centred)
        sums = latents.sum(values)
        decoder_norms.add_gradient(gradients["W_dec"], W_dec, sums * penalty, fused=self.centred)
        mse = squared(error) / len(x)
        terms: dict[str, Number] = {"mse_loss": mse, "l1_loss": (sums @ norms).double() * penalty}
        l0 = count(active) / len(x)
        return StepOutput(gradients, sums > 0, sum(terms.values()), mse, l0, terms)

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Fold the decoder's norms into the encoder, so that saved decoder rows have unit norm."""
        return self.fold(super().exported(parameters, buffers, normalization))

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that are saved with the SAE."""
        return self._describe("l1_coefficient", "target_l0")


class PAnnealed(Standard[StandardConfig]):
    """Standard with the penalty `lambda s sum_i (f_i ||W_dec_i||)^p`, p falling linearly from 1 to `p_final`.

    Whenever p changes, s is multiplied by the ratio of the old penalty to the new one, so that only the penalty's shape
    changes. Powers are computed as `(a + 0.001)^p - 0.001^p`, whose slope at zero is finite.
    """

    capturable = True

    @property
    def schedules(self) -> dict[str, tuple[int | None, str]]:
        """The fall of the power, and the penalty's growth."""
        annealing = (self.config.p_anneal_steps, f"the penalty's power would not reach {self.config.p_final}")
        return {"p_anneal_steps": annealing} | super().schedules

    def initial_buffers(self) -> Buffers:
        """Return p and the penalty's scale."""
        return {"p": torch.tensor(1.0), "penalty_scale": torch.tensor(1.0)}

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec = batch.x, parameters["W_dec"]
        latents = above_threshold(step, parameters, batch, encoded_bias(parameters, self.centred))
        values = latents.pre_acts.relu()
        active = values > 0
        decoder_norms = self.decoder_norms(W_dec)
        norms = decoder_norms.sums
        weighted = values * latents.spread(norms)
        p, scale = self._anneal(weighted, step)
        penalty = self.penalty_weight * step.sparsity_scale * scale / len(x)
        slope = (weighted + _EPSILON).pow_(p - 1).mul_(p * penalty).mul_(active)
        error = error_of(latents.decode(values, W_dec), parameters, batch)
        g = error * (2 / len(x))
        by_values = latents.grad_values(g, W_dec).addcmul_(slope, latents.spread(norms).expand_as(slope))
        gradients = gradients_of(parameters, latents, x, g, values, by_values.mul_(active), self.centred)
        by_norm = latents.sum(slope * values)
        decoder_norms.add_gradient(gradients["W_dec"], W_dec, by_norm, fused=self.centred)
        mse = squared(error) / len(x)
        terms: dict[str, Number] = {"mse_loss": mse, "sparsity_loss": _power_sum(weighted, p) * penalty}
        return StepOutput(gradients, latents.sum(values) > 0, sum(terms.values()), mse, count(active) / len(x), terms)

    def _anneal(self, weighted: Tensor, step: StepInput) -> tuple[Tensor, Tensor]:
        """Set p to its value at this step and return it with the penalty's scale, both on the device."""
        p, scale = step.buffers["p"], step.buffers["penalty_scale"]
        done = p.new_full((), step.steps_done) if step.step_number is None else step.step_number
        share = (done.double() / (self.config.p_anneal_steps or 1)).clamp(max=1)
        new = 1 + ((self.config.p_final or 1.0) - 1) * share
        before, after = (step.across.mean(_power_sum(weighted, power)) for power in (p.double(), new))
        scale.mul_(torch.where((before > 0) & (after > 0), before / after, 1))
        p.copy_(new)
        return p, scale


def _power_sum(weighted: Tensor, p: Tensor) -> Tensor:
    """Return the sum of the powers. Zeros, such as padding, add exactly nothing."""
    powers = (weighted + _EPSILON).pow_(p).sub_(_EPSILON**p)
    return powers.mul_(weighted > 0).sum(dtype=torch.float64)


@register(StandardConfig)
def make_standard(config: StandardConfig, d_in: int, d_out: int | None = None) -> Standard[StandardConfig]:
    """Return the architecture with an L1 penalty, or with p-annealing."""
    return (Standard if config.p_final is None else PAnnealed)(config, d_in, d_out)
