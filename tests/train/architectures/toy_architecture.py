"""An architecture that is no part of Thresher, as a user would write one: this file is all that there is to it.

Its gradients come from autograd, so that the loss is written once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from msgspec import Meta

from thresher.train.architectures import register
from thresher.train.architectures.contract import Batch, Parameters, StepInput, StepOutput
from thresher.train.architectures.penalty import PenaltyArchitecture, PenaltyConfig


class RidgeConfig(PenaltyConfig, frozen=True, kw_only=True):
    """Ridge: ReLU and a penalty on the squares of the latents."""

    architecture: Literal["ridge"] = "ridge"
    l2_coefficient: Annotated[float, Meta(ge=0, description="Weight of the L2 penalty.")]
    encoder_scale: Annotated[float, Meta(gt=0, description="Norm of the encoder's rows before training.")] = 1.0

    @property
    def name_ending(self) -> str:
        return "-l2-{l2_coefficient}"


@register(RidgeConfig)
class Ridge(PenaltyArchitecture[RidgeConfig]):
    """`f = ReLU(W_enc (x - b_dec) + b_enc)`, loss `||x - x_hat||^2 + lambda ||f||^2`. Saved as a standard SAE."""

    saved_as = "standard"
    default_lr = 1e-3

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        parameters = super().initial_parameters(generator)
        parameters["W_enc"] *= self.config.encoder_scale
        return parameters

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        with torch.enable_grad():
            p = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
            latents = ((batch.x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]).relu()
            mse = (latents @ p["W_dec"] + p["b_dec"] - batch.x).square().sum(1).mean()
            l2_loss = latents.square().sum(1).mean() * self.config.l2_coefficient * step.sparsity_scale
            gradients = torch.autograd.grad(mse + l2_loss, list(p.values()))
        fired = latents > 0
        return StepOutput(
            gradients=dict(zip(p, gradients, strict=True)),
            fired=fired.any(0),
            loss=(mse + l2_loss).detach(),
            mse=mse.detach(),
            l0=fired.sum(1).double().mean(),
            terms={"mse_loss": mse.detach(), "l2_loss": l2_loss.detach()},
        )

    def hyperparameters(self) -> dict[str, Any]:
        return super().hyperparameters() | {"l2_coefficient": self.config.l2_coefficient}
