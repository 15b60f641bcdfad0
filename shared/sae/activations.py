"""Activation functions of SAEs: from pre-activations to latents."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def relu(pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """Return the positive pre-activations."""
    return pre_acts.relu()


def topk(pre_acts: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """Return the k largest pre-activations of each row, after ReLU, and zero elsewhere (arXiv 2406.04093)."""
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter_(-1, indices, values.relu())


def abstopk(pre_acts: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """Return the k pre-activations of each row that are largest by absolute value, and zero elsewhere.

    They keep their signs (arXiv 2510.00404).
    """
    indices = pre_acts.detach().abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(pre_acts).scatter(-1, indices, pre_acts.gather(-1, indices))


def jumprelu(
    pre_acts: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """Return the positive pre-activations that are above their threshold (arXiv 2407.14435)."""
    return pre_acts.relu() * (pre_acts > threshold)


def gated(
    gate_pre_acts: Float[Tensor, "*batch d_sae"], magnitude_pre_acts: Float[Tensor, "*batch d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """Return the positive magnitudes whose gate is open (arXiv 2404.16014)."""
    return magnitude_pre_acts.relu() * (gate_pre_acts > 0)
