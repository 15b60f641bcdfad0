"""Forward and backward of a sparse autoencoder through the four sparse operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from .base import Parameters


@dataclass(frozen=True)
class Latents:
    """A ragged sparse matrix of latents, CSR by row."""

    values: Float[Tensor, " nnz"]
    indices: Int64[Tensor, " nnz"]
    offsets: Int64[Tensor, " batch_plus_1"]

    @classmethod
    def from_topk(cls, top_acts: Float[Tensor, "batch k"], top_indices: Int64[Tensor, "batch k"]) -> Latents:
        """Return latents with the same number of entries in every row."""
        batch, k = top_acts.shape
        offsets = torch.arange(0, batch * k + 1, k, device=top_acts.device)
        return cls(top_acts.reshape(-1), top_indices.reshape(-1), offsets)

    @classmethod
    def from_dense(cls, latents: Float[Tensor, "batch d_sae"]) -> Latents:
        """Return the entries that are not zero."""
        rows, indices = latents.nonzero(as_tuple=True)
        offsets = torch.zeros(len(latents) + 1, dtype=torch.int64, device=latents.device)
        torch.cumsum(torch.bincount(rows, minlength=len(latents)), 0, out=offsets[1:])
        return cls(latents[rows, indices], indices, offsets)


def encoded_bias(parameters: Parameters, W_enc: Tensor | None = None) -> Float[Tensor, " d_sae"]:
    """Return the bias that turns `W_enc (x - b_dec) + b_enc` into `W_enc x + bias`."""
    W_enc = parameters["W_enc"] if W_enc is None else W_enc
    return parameters["b_enc"] - W_enc @ parameters["b_dec"]


def sparse_gradients(
    kernels: Any,
    parameters: Parameters,
    x: Float[Tensor, "batch d_in"],
    latents: Latents,
    g: Float[Tensor, "batch d_in"],
    value_gradients: Float[Tensor, " nnz"],
) -> Parameters:
    """Return the gradients of all parameters.

    `g` is the loss's gradient by the reconstruction and `value_gradients` that by the latents. An
    entry that ReLU set to zero passes nothing on.
    """
    d_sae = len(parameters["W_dec"])
    by_pre_acts = torch.where(latents.values > 0, value_gradients, 0)
    place = (latents.indices, latents.offsets)
    sorted_once = (kernels.to_csc(*place, d_sae),) if hasattr(kernels, "to_csc") else ()
    W_dec = kernels.grad_weights(latents.values, *place, g, d_sae, *sorted_once)
    W_enc = kernels.grad_weights(by_pre_acts, *place, x, d_sae, *sorted_once)
    return finish_gradients(parameters, W_enc, _sum_by_latent(by_pre_acts, latents.indices, d_sae), W_dec, g.sum(0))


def finish_gradients(parameters: Parameters, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, g_sum: Tensor) -> Parameters:
    """Add what flows through the centring `x - b_dec` of the encoder's input."""
    W_enc.addr_(b_enc, parameters["b_dec"], alpha=-1)
    b_dec = g_sum - parameters["W_enc"].T @ b_enc
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def _sum_by_latent(values: Tensor, indices: Tensor, d_sae: int) -> Float[Tensor, " d_sae"]:
    return values.new_zeros(d_sae).index_add_(0, indices, values)


def fired(latents: Latents, d_sae: int) -> Bool[Tensor, " d_sae"]:
    """Return which latents are above zero anywhere in the batch."""
    mask = torch.zeros(d_sae, dtype=torch.bool, device=latents.values.device)
    mask[latents.indices[latents.values > 0]] = True
    return mask
