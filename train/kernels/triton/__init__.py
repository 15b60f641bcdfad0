"""The CUDA backend: the sparse operations, and the fused operations of a whole step."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import reference
from ..backend import Backend
from ..csc import SegmentedCsc
from ..entries import Selection, torch_topk
from ..fused_state import AdamState, DenseGradients, Hyperparameters, LatentCounters
from .adam import update
from .csc import to_csc
from .dequantise import dequantise, normalise
from .feature_major import grad_weights, grad_weights_and_bias, sum_by_latent
from .select import select_topk, select_topk_certified
from .step_ends import begin_step, clip_gradients, finish_step, update_b_dec
from .threshold import batch_floor, select_batch_topk, select_threshold
from .token_major import auxk_residual, decode, grad_values, reconstruct
from .topk_step import TopKOptions, TopKStep

__all__ = [
    "AdamState",
    "DenseGradients",
    "Hyperparameters",
    "LatentCounters",
    "SegmentedCsc",
    "Selection",
    "TopKOptions",
    "TopKStep",
    "auxk_residual",
    "batch_floor",
    "begin_step",
    "clip_gradients",
    "decode",
    "dequantise",
    "finish_step",
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
    "update_b_dec",
]


def pre_activations(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """Return all of `x W_enc^T + b_enc` in the dtype of `x`, for architectures that need it dense."""
    return torch.nn.functional.linear(x, W_enc, b_enc.to(x.dtype))


class TritonFixedShapes:
    """The operations of steps that never wait for the device."""

    select_threshold = staticmethod(select_threshold)
    batch_floor = staticmethod(batch_floor)
    select_batch_topk = staticmethod(select_batch_topk)
    topk_step = staticmethod(TopKStep)


class Triton(Backend):
    """The operations of a CUDA device."""

    name = "triton"
    fixed_shapes = TritonFixedShapes()
    pre_activations = staticmethod(pre_activations)
    select_topk = staticmethod(select_topk)
    decode = staticmethod(decode)
    grad_weights = staticmethod(grad_weights)
    grad_weights_and_bias = staticmethod(grad_weights_and_bias)
    sum_by_latent = staticmethod(sum_by_latent)
    to_csc = staticmethod(to_csc)
    dequantise = staticmethod(dequantise)
    topk_of_rows = staticmethod(torch_topk)

    @staticmethod
    def grad_values(
        g: Float[Tensor, "batch d_out"],
        W_dec: Float[Tensor, "d_sae d_out"],
        indices: Int[Tensor, " nnz"],
        offsets: Int[Tensor, " batch_plus_1"],
        csc: Any = None,
    ) -> Float[Tensor, " nnz"]:
        """Return `g[row_j] . W_dec[indices_j]` for each entry, row by row."""
        return grad_values(g, W_dec, indices, offsets)

    @staticmethod
    def normalise(
        rows: Float[Tensor, "batch d_in"],
        mean: Float[Tensor, " d_in"],
        factor: float | Float[Tensor, " d_in"],
        dtype: torch.dtype = torch.bfloat16,
        max_norm: float = math.inf,
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_in"]]:
        """Return `(rows - mean) * factor`, each row shortened to a norm of at most `max_norm`.

        It is in float32 and in `dtype`, and takes one pass if one factor serves all columns.
        """
        if isinstance(factor, Tensor):
            return reference.normalise(rows, mean, factor, dtype, max_norm)
        return normalise(rows, mean, factor, dtype, max_norm)
