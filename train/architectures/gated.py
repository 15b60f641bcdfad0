"""Gated: one path decides which latents are active, another how large they are (arXiv 2404.16014)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from msgspec import Meta
from torch import Tensor

from ...shared.sae import Sae
from ..stream.normalization import Normalization
from .base import check_number_of_latents
from .contract import Batch, Buffers, Number, Parameters, StepInput, StepOutput
from .parts.dense import error_of, squared
from .parts.first_batch import exceeded_by, unused_start
from .parts.latents import above_threshold, count, encoded_bias, gradients_of
from .penalty import PenaltyArchitecture, PenaltyConfig
from .registry import register

# At full scale, half of all random latents would fire at first, and a short run would spend its time undoing that.
_ENCODER_SCALE = 0.1


class GatedConfig(PenaltyConfig, frozen=True, kw_only=True):
    """Gated: one path decides which latents are active, another how large they are (arXiv 2404.16014)."""

    architecture: Literal["gated"] = "gated"
    l1_coefficient: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="Weight of the L1 penalty; with target_l0, where the controller starts."),
    ] = None
    initial_l0: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="Latents per row to fire on the first batch, which sets the gates' biases; they start at 0 if "
            "not given."
        ),
    ] = None
    threshold_lr_scale: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Factor of the learning rate of both biases and the rescaling; 1 if not given."),
    ] = None
    unit_norm_decoder: Annotated[
        bool | None,
        Meta(description="Hold decoder rows at unit norm, without the gradient along them."),
    ] = None

    coefficient_key: ClassVar[str | None] = "l1_coefficient"

    def __post_init__(self) -> None:
        """Check that there are enough latents for the first L0."""
        super().__post_init__()
        check_number_of_latents(self, "initial_l0", self.initial_l0)


@register(GatedConfig)
class Gated(PenaltyArchitecture[GatedConfig]):
    """`f = [pi > 0] ReLU(exp(r) l + b_mag)` with `l = W_enc (x - b_dec)` and `pi = l + b_gate`.

    Loss: `||x - x_hat||^2 + lambda ||ReLU(pi)||_1 + ||x - x_hat'||^2`, where `x_hat'` decodes `ReLU(pi)` with the
    decoder held constant. The encoder starts small, so that the first reconstructions are near the mean.
    """

    saved_as = "gated"
    kind_of_wiring = None
    capturable = True
    betas = (0.0, 0.999)
    eps = 1e-8
    default_lr = 5e-5

    @property
    def unit_norm_decoder(self) -> bool:
        """Whether training holds decoder rows at unit norm; it does by default."""
        return self.config.unit_norm_decoder is not False

    @property
    def lr_scales(self) -> dict[str, float]:
        """Return the factors of the learning rate that are not 1."""
        scale = self.config.threshold_lr_scale or 1.0
        return super().lr_scales | ({} if scale == 1.0 else dict.fromkeys(("b_gate", "b_mag", "r_mag"), scale))

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return the base's weights, the encoder's scaled down, and zero for both biases and the rescaling."""
        parameters = super().initial_parameters(generator)
        parameters["W_enc"] *= _ENCODER_SCALE
        del parameters["b_enc"]
        return parameters | {name: torch.zeros(self.d_sae) for name in ("b_gate", "b_mag", "r_mag")}

    def start(self, parameters: Parameters, batch: Batch) -> None:
        """Set the gates' biases so that each latent fires on initial_l0 / d_sae of the first batch, if given."""
        if self.config.initial_l0 is not None:
            n_active = round(len(batch.x) * self.config.initial_l0 / self.config.d_sae)
            parameters["b_gate"].copy_(-exceeded_by(parameters, batch.x, n_active, self.centred).clamp_min_(0.0))

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec = batch.x, parameters["W_dec"]
        latents = above_threshold(step, parameters, batch, encoded_bias(parameters, self.centred, "b_gate"))
        gate = latents.pre_acts.relu()
        linear = latents.pre_acts - latents.spread(parameters["b_gate"])
        rescale = latents.spread(parameters["r_mag"].exp())
        magnitude = linear * rescale + latents.spread(parameters["b_mag"])
        active = (gate > 0) & (magnitude > 0)
        values = magnitude * active
        penalty = self.penalty_weight * step.sparsity_scale / len(x)

        error = error_of(latents.decode(values, W_dec), parameters, batch)
        auxiliary = error_of(latents.decode(gate, W_dec), parameters, batch)
        g = error * (2 / len(x))
        by_magnitude = latents.grad_values(g, W_dec) * active
        by_gate = (latents.grad_values(auxiliary * (2 / len(x)), W_dec) + penalty) * (gate > 0)
        gradients = gradients_of(parameters, latents, x, g, values, by_magnitude * rescale + by_gate, self.centred)
        del gradients["b_enc"]
        gradients["b_gate"] = latents.sum(by_gate)
        gradients["b_mag"] = latents.sum(by_magnitude)
        gradients["r_mag"] = latents.sum(by_magnitude * linear * rescale)
        mse = squared(error) / len(x)
        terms: dict[str, Number] = {
            "mse_loss": mse,
            "l1_loss": latents.sum(gate).sum().double() * penalty,
            "auxiliary_loss": squared(auxiliary) / len(x),
        }
        l0 = count(active) / len(x)
        return StepOutput(gradients, latents.sum(values) > 0, sum(terms.values()), mse, l0, terms)

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Scale both biases to raw activation units."""
        tensors = super().exported(parameters | {"b_enc": parameters["b_gate"]}, buffers, normalization)
        b_gate, unit = tensors.pop("b_enc"), self.latent_unit(normalization)
        b_mag = parameters["b_mag"] / unit
        if not self.centred:
            # Magnitudes are scaled before their bias, which includes what is subtracted from the input.
            b_mag = b_mag + (b_gate - parameters["b_gate"] / unit) * parameters["r_mag"].exp()
        return tensors | {"b_gate": b_gate, "b_mag": b_mag, "r_mag": parameters["r_mag"]}

    def imported(self, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Return the parameters."""
        return self.held(sae, normalization), {}

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Also report an initial L0 that is not used."""
        return super().differences(sae, normalization) + unused_start(initial_l0=self.config.initial_l0)

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that are saved with the SAE."""
        return self._describe("l1_coefficient", "target_l0")
