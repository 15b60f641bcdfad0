"""The sparse ops in plain PyTorch: what every other backend must compute.

Ragged sparse latents are CSR by token: `values [nnz]`, `indices [nnz]`, `offsets [batch + 1]`; TopK is
the case of `k` entries a row. These run on any device, are differentiable where PyTorch is, and
accumulate in float32 at least; they are written to be read, not to be fast.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in the type to accumulate in: float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rows_of(offsets: Int[Tensor, " batch+1"], nnz: int) -> Int[Tensor, " nnz"]:
    """Return the row of each of the `nnz` entries of a CSR matrix."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff().long(), output_size=nnz)


def uniform_offsets(batch: int, k: int, device: torch.device | str = "cpu") -> Int[Tensor, " batch+1"]:
    """Return the row starts of a CSR matrix with `k` entries in every row."""
    return torch.arange(0, batch * k + 1, max(k, 1), device=device) if k else torch.zeros(batch + 1, dtype=torch.long)


def pre_activations(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"]
) -> Float[Tensor, "batch d_sae"]:
    """Return `x W_enc^T + b_enc`; a row of `W_enc` is a latent."""
    return wide(x) @ wide(W_enc).T + wide(b_enc)


def select_topk(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Float[Tensor, " d_sae"], k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the `k` largest latents of each row, ReLU'd, and which they are."""
    top_acts, top_indices = pre_activations(x, W_enc, b_enc).topk(k, dim=1)
    return top_acts.relu(), top_indices


def select_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"] | float,
) -> tuple[Float[Tensor, " nnz"], Int[Tensor, " nnz"], Int[Tensor, " batch+1"]]:
    """Return, as CSR, the latents whose pre-activation is above `threshold`: ReLU at 0, JumpReLU at theta."""
    pre_acts = pre_activations(x, W_enc, b_enc)
    chosen = pre_acts > threshold
    offsets = torch.zeros(len(x) + 1, dtype=torch.long, device=x.device)
    offsets[1:] = chosen.sum(1).cumsum(0)
    return pre_acts[chosen], chosen.nonzero()[:, 1], offsets


def decode(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch+1"],
    W_dec: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "batch d_in"]:
    """Return `sum_j values_j W_dec[indices_j]` for each row."""
    rows = rows_of(offsets, len(values))
    terms = wide(values)[:, None] * wide(W_dec)[indices.long()]
    return terms.new_zeros(len(offsets) - 1, W_dec.shape[1]).index_add(0, rows, terms)


def grad_values(
    g: Float[Tensor, "batch d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch+1"],
) -> Float[Tensor, " nnz"]:
    """Return `g[row_j] . W_dec[indices_j]` for each entry."""
    rows = rows_of(offsets, len(indices))
    return (wide(g)[rows] * wide(W_dec)[indices.long()]).sum(1)


def grad_weights(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch+1"],
    g: Float[Tensor, "batch d_in"],
    d_sae: int,
) -> Float[Tensor, "d_sae d_in"]:
    """Return for each latent the sum of `values_j g[row_j]` over its entries; zero for an unused latent."""
    rows = rows_of(offsets, len(values))
    terms = wide(values)[:, None] * wide(g)[rows]
    return terms.new_zeros(d_sae, g.shape[1]).index_add(0, indices.long(), terms)


def sum_by_latent(
    values: Float[Tensor, " nnz"], indices: Int[Tensor, " nnz"], offsets: Int[Tensor, " batch+1"], d_sae: int
) -> Float[Tensor, " d_sae"]:
    """Return the sum of each latent's values, as the gradients of biases and thresholds need it."""
    return wide(values).new_zeros(d_sae).index_add(0, indices.long(), wide(values))


def grad_weights_and_bias(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " batch+1"],
    g: Float[Tensor, "batch d_in"],
    d_sae: int,
) -> tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, " d_sae"]]:
    """Return `grad_weights` and `sum_by_latent` of the same values."""
    return grad_weights(values, indices, offsets, g, d_sae), sum_by_latent(values, indices, offsets, d_sae)
