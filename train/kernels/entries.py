"""The entries of a batch's latents that a selection chose, and selections in plain PyTorch.

Sparse latents are CSR by row: `indices [nnz]` and `offsets [batch_plus_1]`, where the entries of row i are
`indices[offsets[i]:offsets[i+1]]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

_SAMPLE = 1 << 16


class Entries(NamedTuple):
    """The latents chosen in each row, as CSR."""

    indices: Int[Tensor, " nnz"]
    offsets: Int64[Tensor, " batch_plus_1"]


class DenseEntries(NamedTuple):
    """All pre-activations, in the compute dtype; used if too many of them (`n_chosen`) were chosen to list."""

    pre_acts: Float[Tensor, "batch d_sae"]
    n_chosen: int


class EntryValues(NamedTuple):
    """Chosen entries and their pre-activations, in the parameters' precision.

    `csc` is the entries' order by latent, as the backend's `to_csc` returns it, if it is already known.
    """

    pre_acts: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    offsets: Int64[Tensor, " batch_plus_1"]
    csc: Any = None


class Selection(NamedTuple):
    """Chosen latents as CSR; `values` are pre-activations. Entries from `offsets[-1]` on are undefined."""

    values: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    offsets: Int64[Tensor, " batch_plus_1"]


def entries_of(chosen: Bool[Tensor, "batch d_sae"]) -> Entries:
    """Return a boolean matrix's true entries."""
    rows, indices = chosen.nonzero(as_tuple=True)
    offsets = torch.zeros(len(chosen) + 1, dtype=torch.int64, device=chosen.device)
    torch.cumsum(torch.bincount(rows, minlength=len(chosen)), 0, out=offsets[1:])
    return Entries(indices, offsets)


def packed_positive(acts: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]) -> Selection:
    """Return the positive entries, in buffers of `batch * k` entries, without waiting for the device.

    Values from `offsets[-1]` on are zero, and their indices arbitrary.
    """
    n, there = acts.numel(), (acts > 0).flatten()
    ends = there.cumsum(0)
    places = torch.where(there, ends - 1, n)
    values = acts.new_zeros(n + 1).scatter_(0, places, acts.flatten())[:n]
    latents = indices.new_zeros(n + 1).scatter_(0, places, indices.flatten())[:n]
    offsets = torch.nn.functional.pad(ends[acts.shape[1] - 1 :: acts.shape[1]], (1, 0))
    return Selection(values, latents, offsets)


def torch_topk(pre_acts: Float[Tensor, "batch n"], k: int) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Return each row's `k` largest entries and their columns, in any order, by `torch.topk`."""
    values, columns = torch.topk(pre_acts, k, dim=1, sorted=False)
    return values, columns


def _itself(values: Tensor) -> Tensor:
    return values


def batch_threshold(
    pre_acts: Float[Tensor, "batch d_sae"],
    n_kept: int,
    n_slices: int = 1,
    least: Callable[[Tensor], Tensor] = _itself,
    all_values: Callable[[Tensor], Tensor] = _itself,
) -> Float[Tensor, ""]:
    """Return the `n_kept`-th largest pre-activation of a batch, or the smallest positive one if fewer are positive.

    Returns infinity if none is positive. If ranks hold parts of the matrix, `n_slices` is the number of ranks that
    share its rows, `least` returns the minimum over ranks, and `all_values` the values of all ranks.

    A sample gives a lower bound that rarely fails, so that only entries above the bound are ranked.
    """
    flat = pre_acts.reshape(-1)
    stride = max(1, len(flat) // _SAMPLE)
    sample = flat[::stride]
    rank = 2 * n_kept // n_slices // stride + 64
    bound = sample.kthvalue(len(sample) - rank + 1).values if rank < len(sample) else flat.new_zeros(())
    candidates = all_values(flat[flat >= least(bound).clamp_min(0)])
    if len(candidates) < n_kept:
        candidates = all_values(flat[flat > 0])
    candidates = candidates[candidates > 0]
    if len(candidates) <= n_kept:
        return candidates.min() if len(candidates) else flat.new_full((), torch.inf)
    return candidates.kthvalue(len(candidates) - n_kept + 1).values
