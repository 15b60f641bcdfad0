"""Which latents of each row are kept: the k largest pre-activations, or those that are active.

On a CPU the k largest are found by the maxima of groups of latents. `torch.topk` partitions whole rows, which costs
nearly as much as the encoder's product. The k-th largest of 2k group maxima is a floor that at least k entries reach.
One comparison with it leaves about 1.4 k candidates per row.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

GROUPS_PER_K = 2
LATENTS_PER_GROUP = 4
"""Smallest group size; with smaller groups, `torch.topk` over the row is as fast."""


def largest(
    pre_acts: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Return the k largest entries of each row and their latents, as `torch.topk(sorted=False)` does.

    Ties with the k-th largest entry are broken arbitrarily. `torch.topk` is called if the rows are too short for
    groups, contain NaN, or are not on a CPU.
    """
    batch, d_sae = pre_acts.shape
    n_groups = GROUPS_PER_K * k
    per_group = d_sae // n_groups
    if pre_acts.device.type != "cpu" or per_group < LATENTS_PER_GROUP or not batch:
        return pre_acts.topk(k, dim=-1, sorted=False)
    grouped = pre_acts[:, : per_group * n_groups].view(batch, per_group, n_groups)
    floor = grouped.amax(dim=1).topk(k, dim=1, sorted=False).values.amin(dim=1)
    candidates = np.flatnonzero((pre_acts >= floor[:, None]).numpy())
    row = candidates // d_sae
    count = np.bincount(row, minlength=batch)
    if count.min() < k:
        return pre_acts.topk(k, dim=-1, sorted=False)
    place = _places(count, int(count.max()))
    flat = torch.from_numpy(candidates)
    padded = pre_acts.new_full((batch, int(count.max())), -torch.inf)
    latents = torch.zeros(padded.shape, dtype=torch.int64)
    padded.view(-1)[place] = pre_acts.reshape(-1)[flat]
    latents.view(-1)[place] = flat - torch.from_numpy(row) * d_sae
    chosen = padded.topk(k, dim=1, sorted=False)
    return chosen.values, latents.gather(1, chosen.indices)


def active_entries(
    latents: Float[Tensor, "batch d_sae"],
) -> tuple[Float[Tensor, "batch m"], Int64[Tensor, "batch m"]]:
    """Return the latents of each row that are not zero and their indices, padded to the widest row, at least one.

    A row's indices are distinct: padding is zeros at latents that are not active. NaN is not zero.
    """
    batch, d_sae = latents.shape
    active = latents.detach() != 0
    if latents.device.type != "cpu" or not batch:
        widest = int(active.sum(dim=-1).max()) if batch else 0
        indices = active.to(torch.uint8).topk(max(widest, 1), dim=-1, sorted=False).indices
        return latents.gather(1, indices), indices
    flags = active.numpy()
    found = np.flatnonzero(flags)
    row = found // d_sae
    count = np.bincount(row, minlength=batch)
    width = max(int(count.max()), 1)
    idle = ~flags[:, :width]  # at least as many as a row lacks
    filled = np.zeros((batch, width), dtype=bool)
    filled.reshape(-1)[_places(count, width)] = True
    padded = np.empty((batch, width), dtype=np.int64)
    padded[filled] = found - row * d_sae
    padded[~filled] = np.nonzero(idle & (idle.cumsum(axis=1) <= (width - count)[:, None]))[1]
    indices = torch.from_numpy(padded)
    return latents.gather(1, indices), indices


def _places(count: np.ndarray, width: int) -> np.ndarray:
    """Return where the entries of rows go in a flat array with `width` places per row, from the entries per row."""
    return np.arange(count.sum()) + np.repeat(np.arange(len(count)) * width - np.cumsum(count) + count, count)
