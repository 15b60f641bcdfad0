"""Sums over a crosscoder's reconstructions at each of its hook points, and its decoder norms there."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ...shared.sae import Sae
from ..saes.hook_group import places
from .encoding import Encoded
from .reconstruction import ReconstructionSums

WRITES = 0.1
"""A latent writes to a hook point where its decoder norm is at least this share of its largest one."""


def decoder_norms(sae: Sae, n_places: int) -> Float[Tensor, "d_sae places"]:
    """Return the norm of each latent's decoder row at each hook point."""
    return sae.W_dec.detach().float().view(sae.d_sae, n_places, -1).norm(dim=2)


def norm_shares(sae: Sae, n_places: int) -> Float[np.ndarray, "d_sae places"]:
    """Return each hook point's share of the sum of a latent's decoder norms; zero for a row of zeros."""
    norms = decoder_norms(sae, n_places)
    return (norms / norms.sum(dim=1, keepdim=True).clamp_min(1e-12)).cpu().numpy()


class PlaceSums:
    """Sums over rows of a crosscoder's reconstructions, at each of its hook points."""

    def __init__(self, sae: Sae, target: str, n_groups: int, device: str = "cpu"):
        self.places = places(target)
        norms = decoder_norms(sae, len(self.places))
        self.writes: Bool[Tensor, "places d_sae"] = (norms >= WRITES * norms.amax(dim=1, keepdim=True)).T
        self.sums = {place: ReconstructionSums(n_groups, device) for place in self.places}

    def add(self, x: Float[Tensor, "rows d_in"], encoded: Encoded, group: Int64[Tensor, " rows"]) -> None:
        """Add rows, of whose active latents each hook point counts those that write to it."""
        at = zip(self.places, x.chunk(len(self.places), 1), encoded.x_hat.chunk(len(self.places), 1), strict=True)
        for (place, target, x_hat), writes in zip(at, self.writes.to(encoded.latents.dtype), strict=True):
            self.sums[place].add(target, x_hat, encoded.active @ writes, encoded.latents @ writes, group)
