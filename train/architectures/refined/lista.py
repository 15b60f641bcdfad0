"""LISTA-Matryoshka: an encoder that looks a second time, at what its first latents leave unexplained.

With the latents `f0` that Matryoshka BatchTopK would choose, the encoder reads

    u = x + refine_rate (x - x_hat(f0))

and chooses again. `W_enc u` is `W_enc x` plus a step along `W_enc` times the residual: one unrolled step of iterative
shrinkage with learned weights (LISTA, Gregor and LeCun 2010). Latents that another one explains away get smaller, and
those that it hid get larger. All gradients go through both choices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor

from ....shared.sae import Sae
from ...stream.normalization import Normalization
from ..contract import Batch, Buffers, Number, Parameters, StepInput, StepOutput
from ..matryoshka import MatryoshkaBatchTopK, MatryoshkaBatchTopKConfig
from ..parts.dense import cast, encoder_transpose_times, error_of_nothing, squared, sum_of_rows
from ..parts.latents import SparseLatents
from ..registry import register


class ListaMatryoshkaConfig(MatryoshkaBatchTopKConfig, frozen=True, kw_only=True):
    """Matryoshka BatchTopK with one unrolled step of LISTA: latents are chosen again after a look at the residual."""

    architecture: Literal["lista_matryoshka"] = "lista_matryoshka"  # type: ignore[assignment]
    refine_rate: Annotated[
        float, Meta(gt=0, description="Share of the first choice's residual that is added to what is encoded again.")
    ] = 0.3


@register(ListaMatryoshkaConfig)
class ListaMatryoshka(MatryoshkaBatchTopK):
    """Matryoshka's loss over the second choice. Saved with both thresholds, as `lista`."""

    saved_as = "lista"
    kind_of_wiring = "sae"

    def initial_buffers(self) -> Buffers:
        """Return the running thresholds of both choices, negative until the first batch sets them."""
        return super().initial_buffers() | {"first_threshold": torch.tensor(-1.0)}

    @property
    def refine_rate(self) -> float:
        """The share of the residual that is added."""
        return self.config.refine_rate  # type: ignore[attr-defined]

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Return the SAE with the thresholds of both choices, each the same for every latent."""
        first = buffers["first_threshold"].clamp_min(0) / self.latent_unit(normalization)
        return super().exported(parameters, buffers, normalization) | {"first_threshold": first.repeat(self.d_sae)}

    def imported(self, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Return the parameters, and the means of the SAE's thresholds as the running thresholds."""
        parameters, buffers = super().imported(sae, normalization)
        return parameters, buffers | {"first_threshold": self.held(sae, normalization)["first_threshold"].mean()}

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that are saved with the SAE."""
        return super().hyperparameters() | {"refine_rate": self.refine_rate}

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients, through the second choice and through what it read of the first."""
        x, W_enc, W_dec, rate = batch.x, parameters["W_enc"], parameters["W_dec"], self.refine_rate
        first = self.select(parameters, batch, replace(step, buffers={"threshold": step.buffers["first_threshold"]}))
        first_failed = None if step.room is None else step.room.failed.clone()
        first_values = first.pre_acts.relu()
        u = x - rate * (first.decode(first_values, W_dec) + error_of_nothing(parameters, batch))
        latents = self.select(parameters, Batch(u, cast(u, batch.x_compute.dtype), x), step)
        if step.room is not None and first_failed is not None:
            torch.maximum(step.room.failed, first_failed, out=step.room.failed)
        values = latents.pre_acts.relu()
        errors = self._errors(parameters, batch, latents)
        squares = [squared(error) / len(x) for error in errors]

        scale, g = 2 / (len(x) * step.total_variance), torch.zeros_like(x)
        by_values, by_W_dec = values.new_zeros(len(values) + 1), []  # unused entries of a group write to the last one
        for (lo, hi), error in reversed(list(zip(self._bounds, errors, strict=True))):
            g = g + error * scale
            group, chosen = latents.columns(lo, hi)
            by_values[chosen] = group.grad_values(g, W_dec[lo:hi])
            by_W_dec.insert(0, group.grad_weights(group.pre_acts.relu(), g))
        by_pre_acts = torch.where(values > 0, by_values[:-1], 0)
        by_u = latents.decode(by_pre_acts, W_enc)
        # u = (1 + rate) x - rate (b_dec + first_values W_dec)
        by_first = torch.where(first_values > 0, first.grad_values(by_u, W_dec) * -rate, 0)
        second_W_enc, second_b_enc = latents.grad_weights_and_bias(by_pre_acts, u)
        first_W_enc, first_b_enc = first.grad_weights_and_bias(by_first, x)
        b_enc = second_b_enc + first_b_enc
        gradients = {
            "W_enc": (second_W_enc + first_W_enc).addr_(b_enc, parameters["b_dec"], alpha=-1),
            "b_enc": b_enc,
            "W_dec": torch.cat(by_W_dec) - rate * first.grad_weights(first_values, by_u),
            "b_dec": sum_of_rows(g) - encoder_transpose_times(W_enc, b_enc) - rate * sum_of_rows(by_u),
        }
        terms: dict[str, Number] = {"mse_loss": sum(squares) / step.total_variance}
        return self.finish(parameters, batch, step, latents, gradients, errors[-1], terms, squares[-1])

    @property
    def _bounds(self) -> list[tuple[int, int]]:
        return list(zip([0, *self.prefixes[:-1]], self.prefixes, strict=True))

    def _errors(
        self, parameters: Parameters, batch: Batch, latents: SparseLatents
    ) -> list[Float[Tensor, "batch d_in"]]:
        """Return the error of every prefix's reconstruction."""
        errors, error = [], error_of_nothing(parameters, batch)
        for lo, hi in self._bounds:
            group, _ = latents.columns(lo, hi)
            error = error + group.decode(group.pre_acts.relu(), parameters["W_dec"][lo:hi])
            errors.append(error)
        return errors
