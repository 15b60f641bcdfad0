"""The CUDA backend: the sparse ops, and the fused ones that a whole step is made of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .adam import AdamState, DenseGradients, Hyperparameters, update
from .csc import Csc, to_csc
from .dequantise import dequantise, normalise
from .feature_major import grad_weights, grad_weights_and_bias, sum_by_latent
from .select import select_topk, select_topk_certified
from .threshold import Selection, batch_floor, select_batch_topk, select_threshold
from .token_major import decode, grad_values, reconstruct
from .topk_step import TopKOptions, TopKStep

__all__ = [
    "AdamState",
    "Csc",
    "DenseGradients",
    "Hyperparameters",
    "Selection",
    "TopKOptions",
    "TopKStep",
    "batch_floor",
    "decode",
    "dequantise",
    "grad_values",
    "grad_weights",
    "grad_weights_and_bias",
    "normalise",
    "pre_activations",
    "reconstruct",
    "select_batch_topk",
    "select_threshold",
    "select_topk",
    "select_topk_certified",
    "sum_by_latent",
    "to_csc",
    "update",
]


def pre_activations(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """Return all of `x W_enc^T + b_enc` in the dtype of `x`: for architectures that need them dense."""
    return torch.nn.functional.linear(x, W_enc, b_enc.to(x.dtype))
