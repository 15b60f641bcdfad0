"""What a whole step of fused kernels is given and holds: options, and parameters with their moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor


@dataclass(frozen=True)
class AdamState:
    """A parameter of the encoder or decoder, its moments, and the copy that products read, bfloat16 by default."""

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
    """Adam's constants, and on the device what changes from step to step, so that a captured graph sees it.

    `schedule` is [lr, 1 - beta1^t, 1 - beta2^t, clip coefficient].
    """

    schedule: Float[Tensor, " 4"]
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10


class DenseGradients(NamedTuple):
    """Gradients of a few latents' parameters that are added to those of the sparse entries, as AuxK's are.

    `slots` says which row a latent's are, and -1 for a latent without any; the encoder's are over x, not x - centre.
    """

    slots: Int32[Tensor, " d_sae"]
    W_enc: Float[Tensor, "latents d_in"]
    W_dec: Float[Tensor, "latents d_in"]
    b_enc: Float[Tensor, " latents"]


@dataclass(frozen=True)
class TopKOptions:
    """What a step does. Latents' values are those of the product, in the compute dtype, that chose them."""

    k: int
    total_variance: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    max_norm: float | None = None
    aux_coefficient: float = 0.0
    k_aux: int = 0
    dead_after_tokens: int = 10_000_000
