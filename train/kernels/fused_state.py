"""The options and state of a step of fused kernels: parameters with their moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int32, Int64
from torch import Tensor

GROUP = 16
"""Latents that a program of `update` takes: the order of the sums over latents depends on it, not on the device."""


@dataclass(frozen=True)
class AdamState:
    """A parameter of the encoder or decoder, its moments, and its copy for products, bfloat16 by default."""

    weight: Float[Tensor, " d_sae *d_in"]
    mean: Float[Tensor, " d_sae *d_in"]
    square: Float[Tensor, " d_sae *d_in"]
    shadow: Float[Tensor, " d_sae *d_in"]

    @classmethod
    def of(cls, weight: Float[Tensor, " d_sae *d_in"], compute_dtype: torch.dtype = torch.bfloat16) -> AdamState:
        """Return the state before the first step; it owns its contiguous float32 weight."""
        weight = weight.detach().float().contiguous().clone()
        return cls(weight, torch.zeros_like(weight), torch.zeros_like(weight), weight.to(compute_dtype, copy=True))


@dataclass(frozen=True)
class Hyperparameters:
    """Adam's constants, and the values that change at every step; these are on the device for captured graphs.

    `schedule` is [lr, 1 - beta1^t, 1 - beta2^t, clip coefficient].
    """

    schedule: Float[Tensor, " 4"]
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    decoder_lr_scale: float = 1.0


class DenseGradients(NamedTuple):
    """Gradients of a few latents' parameters, such as AuxK's, that are added to those of the sparse entries.

    `slots` holds the row of each latent's gradients, or -1 for none. The encoder's gradients are with respect to x, not
    x - centre.
    """

    slots: Int32[Tensor, " d_sae"]
    W_enc: Float[Tensor, "latents d_in"]
    W_dec: Float[Tensor, "latents d_in"]
    b_enc: Float[Tensor, " latents"]


class LatentCounters(NamedTuple):
    """The tokens since each latent fired, and how many latents were dead before the last step."""

    tokens_since_fired: Int64[Tensor, " d_sae"]
    n_dead: Int32[Tensor, ""]
    dead_after_tokens: int


class DivergenceWatch(NamedTuple):
    """Where a step leaves its number, loss and squared error if it is the first of which one is not sound.

    The number is the first of `now`. `failure` is zero until then; `limit` is the largest squared error that is sound.
    """

    now: Float64[Tensor, " 4"]
    failure: Float64[Tensor, " 3"]
    limit: float


class StepMetrics(NamedTuple):
    """A step's metrics, which are on the device: the loss is relative to the variance, the squared error is not."""

    loss: Float64[Tensor, ""]
    mse: Float64[Tensor, ""]
    l0: Float64[Tensor, ""]
    mse_loss: Float64[Tensor, ""]
    auxk_loss: Float64[Tensor, ""]
    explained_variance: Float64[Tensor, ""]
    n_dead: Float64[Tensor, ""]


@dataclass(frozen=True)
class TopKOptions:
    """The options of a step. Latents take the values of the product that selected them, in the compute dtype."""

    k: int
    total_variance: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    decoder_lr_scale: float = 1.0
    max_norm: float | None = None
    aux_coefficient: float = 0.0
    k_aux: int = 0
    dead_after_tokens: int = 10_000_000
