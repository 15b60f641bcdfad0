"""Per-latent statistics: how often and how strongly each latent fires, and the histogram of densities."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

DENSITY_EDGES = np.linspace(-8, 0, 33)
"""Bin edges of log10 density, a quarter of a decade apart, the same for every SAE."""


class LatentSums:
    """The number of firings, the sum and the maximum of every latent's activations."""

    def __init__(self, d_sae: int, device: str = "cpu"):
        self.n_rows = 0
        self._firings = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._sum = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._max = torch.zeros(d_sae, dtype=torch.float32, device=device)

    def add_dense(self, latents: Float[Tensor, "rows d_sae"], active: Float[Tensor, "rows d_sae"]) -> None:
        """Add rows, with `active` one where a latent fires; sums are float32 within a call, float64 across calls."""
        self.n_rows += len(latents)
        self._firings += active.sum(dim=0).to(torch.int64)
        self._sum += latents.sum(dim=0).to(torch.float64)
        if len(latents):
            self._max = torch.maximum(self._max, latents.amax(dim=0))

    def add_sparse(self, top_acts: Float[Tensor, "rows m"], top_indices: Int64[Tensor, "rows m"]) -> None:
        """Add rows of latents given as values and indices; a value of zero is padding."""
        self.n_rows += len(top_acts)
        values, indices = top_acts.reshape(-1), top_indices.reshape(-1)
        self._firings.index_add_(0, indices, (values != 0).to(torch.int64))
        # Not `bincount`, which on a GPU waits for the largest index.
        self._sum += torch.zeros_like(self._sum).index_add_(0, indices, values.to(torch.float64))
        self._max.scatter_reduce_(0, indices, values, "amax")

    @property
    def firings(self) -> Int64[np.ndarray, " d_sae"]:
        """The number of rows on which each latent is nonzero."""
        return self._firings.cpu().numpy()

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """The fraction of rows on which each latent is nonzero."""
        return self.firings / max(self.n_rows, 1)

    @property
    def mean_activation(self) -> Float[np.ndarray, " d_sae"]:
        """The mean activation over the rows on which the latent fires; NaN if it never fires."""
        firings = self.firings
        total = self._sum.cpu().numpy()
        return np.divide(total, firings, out=np.full(len(total), np.nan), where=firings > 0)

    @property
    def max_activation(self) -> Float[np.ndarray, " d_sae"]:
        """The largest activation; zero for a latent that never fires."""
        return self._max.cpu().numpy()


def density_summary(density: Float[np.ndarray, " d_sae"]) -> dict[str, Any]:
    """Return the fraction of dead latents, and the histogram of log10 density over the live ones."""
    alive = density[density > 0]
    counts, _ = np.histogram(np.log10(alive).clip(DENSITY_EDGES[0], DENSITY_EDGES[-1]), bins=DENSITY_EDGES)
    return {
        "dead_fraction": float((density == 0).mean()),
        "density_histogram": {"edges": DENSITY_EDGES.tolist(), "counts": counts.tolist()},
    }
