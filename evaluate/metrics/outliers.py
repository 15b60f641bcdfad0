"""Held-out rows with massive activations: a few rows that may hold most of the variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...shared.model.hook_points import members
from ..saes.hook_group import concatenate
from .held_out import HeldOut

OUTLIER_NORM = 10.0
"""An outlier's distance from the mean, in multiples of the median distance; training shortens such rows by default."""

_SAMPLE_ROWS = 1 << 15


@dataclass(frozen=True)
class Outliers:
    """What makes a row of a hook point (or group) an outlier: a distance from `center` above `max_norm`."""

    center: Float[Tensor, " d_in"]
    max_norm: Float[Tensor, ""]

    def among(self, x: Float[Tensor, "rows d_in"]) -> Bool[Tensor, " rows"]:
        """Return which rows are outliers."""
        return torch.linalg.vector_norm(x - self.center, dim=1) > self.max_norm


def outliers_of(held_out: HeldOut, groups: Sequence[str], block_rows: int, device: str) -> dict[str, Outliers]:
    """Return what an outlier is at each hook point or group, by the rows of evenly spaced contexts."""
    sample = held_out.subset(_SAMPLE_ROWS)
    sample = sample if sample.n_rows else held_out
    read = list(dict.fromkeys(hook_point for group in groups for hook_point in members(group)))
    blocks = list(sample.blocks(read, block_rows, device))
    found = {}
    for group in groups:
        rows = torch.cat([concatenate(block.activations, group) for block in blocks])
        center = rows.mean(dim=0)
        found[group] = Outliers(center, OUTLIER_NORM * torch.linalg.vector_norm(rows - center, dim=1).median())
    return found
