"""Transcoders: from one place of the model to another (arXiv 2406.11944), also with a skip path (2501.18823)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor

from ...shared.sae import Sae
from ...shared.sae.formats.files import saelens_hook_name
from ..stream.normalization import Normalization
from .base import PenaltyArchitecture, PenaltyConfig
from .contract import Batch, Buffers, Number, Parameters, StepInput, StepOutput
from .parts.dense import squared
from .parts.latents import above_threshold, count
from .registry import register


class DecoderPenaltyConfig(PenaltyConfig, frozen=True, kw_only=True):
    """Configuration of a transcoder or crosscoder, whose penalty is weighted by decoder norms."""

    l1_coefficient: Annotated[float, Meta(ge=0, description="Weight of the L1 penalty.")]

    name_ending: ClassVar[str] = "-l1-{l1_coefficient}"


class TranscoderConfig(DecoderPenaltyConfig, frozen=True, kw_only=True):
    """Transcoder: from one place of the model to another (arXiv 2406.11944)."""

    architecture: Literal["transcoder"] = "transcoder"

    unused: ClassVar[tuple[str, ...]] = ()


class SkipTranscoderConfig(DecoderPenaltyConfig, frozen=True, kw_only=True):
    """Skip transcoder: a transcoder with a linear path beside the latents (arXiv 2501.18823)."""

    architecture: Literal["skip_transcoder"] = "skip_transcoder"

    unused: ClassVar[tuple[str, ...]] = ()


D = TypeVar("D", bound=DecoderPenaltyConfig)


@register(TranscoderConfig)
class Transcoder(PenaltyArchitecture[D]):
    """`y_hat = ReLU(W_enc x + b_enc) W_dec + b_dec`, loss `||y - y_hat||^2 + lambda sum_i f_i ||W_dec_i||`.

    x is an MLP's input, y its output; `b_dec` starts at the mean of y. Decoder norms are free while training and
    folded into the encoder on saving.
    """

    saved_as = "transcoder"
    capturable = True
    kind_of_wiring = "transcoder"
    eps = 1e-8

    @property
    def unit_norm_decoder(self) -> bool:
        """Decoder norms are free, because the penalty depends on them."""
        return False

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Return decoder rows of norm 0.1, the encoder their transpose where the widths agree, or else random."""
        W_dec = torch.randn(self.d_sae, self.d_out, generator=generator)
        W_dec *= 0.1 / W_dec.norm(dim=1, keepdim=True)
        W_enc = W_dec
        if self.d_in != self.d_out:
            W_enc = torch.randn(self.d_sae, self.d_in, generator=generator)
            W_enc = W_enc * (0.1 / W_enc.norm(dim=1, keepdim=True))
        return {
            "W_enc": W_enc.clone(),
            "b_enc": torch.zeros(self.d_sae),
            "W_dec": W_dec,
            "b_dec": torch.zeros(self.d_out),
        }

    def blocks(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae n d"]:
        """Return the decoder by target; a latent's norm is the sum of its norms there."""
        return W_dec[:, None]

    def step(self, parameters: Parameters, batch: Batch, step: StepInput) -> StepOutput:
        """Return the loss and its gradients."""
        x, W_dec = batch.x, parameters["W_dec"]
        target = x if batch.target is None else batch.target
        latents = above_threshold(step, parameters, batch, parameters["b_enc"])
        values = latents.pre_acts.relu()
        active = values > 0
        penalty = (self.config.l1_coefficient or 0.0) * step.sparsity_scale / len(x)
        block_norms = self.blocks(W_dec).norm(dim=2)
        norms = block_norms.sum(1)
        error = (latents.decode(values, W_dec) + parameters["b_dec"]).sub_(target)
        if "W_skip" in parameters:
            error.addmm_(x, parameters["W_skip"].T)
        g = error * (2 / len(x))
        by_pre_acts = latents.grad_values(g, W_dec).add_(latents.spread(norms * penalty)).mul_(active)
        sums = latents.sum(values)
        by_norm = (sums * penalty)[:, None, None] / block_norms.clamp_min(1e-12)[:, :, None]
        gradients = {
            "W_enc": latents.grad_weights(by_pre_acts, x),
            "b_enc": latents.sum(by_pre_acts),
            "W_dec": latents.grad_weights(values, g) + (self.blocks(W_dec) * by_norm).view_as(W_dec),
            "b_dec": g.sum(0),
        }
        if "W_skip" in parameters:
            gradients["W_skip"] = g.T @ x
        mse = squared(error) / len(x)
        terms: dict[str, Number] = {"mse_loss": mse, "l1_loss": (sums @ norms).double() * penalty}
        return StepOutput(gradients, sums > 0, sum(terms.values()), mse, count(active) / len(x), terms)

    def exported(self, parameters: Parameters, buffers: Buffers, normalization: Normalization) -> dict[str, Tensor]:
        """Return tensors for raw inputs and targets, each of which has its own mean and scale."""
        mean, scale = normalization.mean.to(parameters["W_enc"].dtype), normalization.scale
        target = normalization.target or normalization
        W_enc, W_dec = parameters["W_enc"] * scale, parameters["W_dec"] / target.scale
        b_dec = parameters["b_dec"] / target.scale + target.mean.to(W_dec.dtype)
        norms = self.blocks(W_dec).norm(dim=2).sum(1).clamp_min(1e-8)
        tensors = {
            "W_enc": W_enc.T * norms,
            "b_enc": (parameters["b_enc"] - W_enc @ mean) * norms,
            "W_dec": W_dec / norms[:, None],
            "b_dec": b_dec,
        }
        if "W_skip" in parameters:
            W_skip = (parameters["W_skip"] * scale).T / target.scale
            tensors |= {"W_skip": W_skip.T, "b_dec": b_dec - mean @ W_skip}
        return tensors

    def imported(self, sae: Sae, normalization: Normalization) -> tuple[Parameters, Buffers]:
        """Return the parameters, with decoder norms of one on normalised targets."""
        tensors = self._held(sae)
        mean, scale = normalization.mean, normalization.scale
        target = normalization.target or normalization
        W_enc, W_dec = tensors["W_enc"].T / scale, tensors["W_dec"] * target.scale
        bias = tensors["b_enc"] + mean @ tensors["W_enc"]
        if sae.apply_b_dec_to_input:
            bias = bias - tensors["b_dec"] @ tensors["W_enc"]
        b_dec = tensors["b_dec"] - target.mean
        parameters: Parameters = {}
        if "W_skip" in tensors:
            b_dec = b_dec + mean @ tensors["W_skip"].T
            parameters["W_skip"] = tensors["W_skip"] / scale * target.scale
        norms = self.blocks(W_dec).norm(dim=2).sum(1).clamp_min(1e-8)
        return parameters | {
            "W_enc": W_enc * norms[:, None],
            "b_enc": bias * norms,
            "W_dec": W_dec / norms[:, None],
            "b_dec": b_dec * target.scale,
        }, {}

    def check_source(self, sae: Sae) -> None:
        """Raise `SaeError` if the SAE does not say what it reconstructs."""
        _ = sae.target_hook_point

    def differences(self, sae: Sae, normalization: Normalization) -> list[str]:
        """Also report another target."""
        found, out = super().differences(sae, normalization), self.config.wiring.writes[0]
        if sae.target_hook_point != out:
            found.append(f"it reconstructs '{sae.target_hook_point}', this one '{out}'")
        return found

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters that are saved with the SAE."""
        return self._describe("l1_coefficient")

    def to_sae(
        self, parameters: Parameters, buffers: Buffers, normalization: Normalization, metadata: dict[str, Any]
    ) -> Sae:
        """Return the transcoder, whose metadata names its target as `hook_name_out`."""
        target = {"hook_name_out": saelens_hook_name(self.config.wiring.writes[0])}
        return super().to_sae(parameters, buffers, normalization, metadata | target)


@register(SkipTranscoderConfig)
class SkipTranscoder(Transcoder[SkipTranscoderConfig]):
    """A transcoder with a linear path from x to y, `y_hat = f W_dec + b_dec + W_skip x`, that starts at zero."""

    saved_as = "skip_transcoder"
    capturable = True

    def initial_parameters(self, generator: torch.Generator) -> Parameters:
        """Add the skip path."""
        return super().initial_parameters(generator) | {"W_skip": torch.zeros(self.d_out, self.d_in)}
