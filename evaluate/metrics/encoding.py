"""Encode and decode rows on the cheaper of two paths: sparse for TopK, dense for other architectures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ...shared.sae import Sae
from .latent_sums import LatentSums

LATENT_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Pre-activations held at a time. On a CPU 16 MiB in float32: the allocator returns larger temporaries to the system,
and allocating them again causes page faults."""

FEWEST_ROWS = 128
"""Smallest number of rows encoded at a time: with fewer, reading the encoder's weights dominates."""


@dataclass(frozen=True)
class EncodedRows:
    """The latents of some rows: values and their indices, or a dense matrix if `top_indices` is None.

    Latents are negative only if `is_signed`.
    """

    latents: Float[Tensor, "rows m"]
    top_indices: Int64[Tensor, "rows m"] | None
    x_hat: Float[Tensor, "rows d_out"]
    is_signed: bool = False

    @cached_property
    def magnitudes(self) -> Float[Tensor, "rows m"]:
        """The latents' absolute values."""
        return self.latents.abs() if self.is_signed else self.latents

    @cached_property
    def active(self) -> Float[Tensor, "rows m"]:
        """One where a latent fires, else zero. float32 because it sums several times faster than booleans."""
        return self.magnitudes.sign()

    @property
    def l0(self) -> Float[Tensor, " rows"]:
        """The number of nonzero latents per row."""
        return self.active.sum(dim=1)

    @property
    def l1(self) -> Float[Tensor, " rows"]:
        """The sum of the latents' absolute values per row."""
        return self.magnitudes.sum(dim=1)

    def count_among(self, weights: Float[Tensor, " d_sae"]) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Return `l0` and `l1` with each latent counted by its weight."""
        if self.top_indices is None:
            return self.active @ weights, self.magnitudes @ weights
        here = weights[self.top_indices]
        return (self.active * here).sum(dim=1), (self.magnitudes * here).sum(dim=1)

    def add_to(self, sums: LatentSums) -> None:
        """Add these latents to `sums`, by their absolute values."""
        if self.top_indices is None:
            sums.add_dense(self.magnitudes, self.active)
        else:
            sums.add_sparse(self.magnitudes, self.top_indices)


def encode(sae: Sae, x: Float[Tensor, "rows d_in"]) -> EncodedRows:
    """Return the latents and the reconstruction of rows."""
    top_indices = None
    if sae.selection in ("topk", "abstopk"):
        latents, top_indices = sae.encode_sparse(x)
        x_hat = sae.decode_sparse(latents, top_indices, x)
    else:
        latents = sae.encode(x)
        x_hat = sae.decode(latents, x)
    skipped = sae.skip_path(x)
    x_hat = x_hat if skipped is None else x_hat + skipped
    return EncodedRows(latents, top_indices, x_hat, sae.is_signed)


def reconstruct_in_parts(sae: Sae, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
    """Return the reconstruction of any number of rows, computed in parts to bound memory."""
    return torch.cat([encode(sae, part).x_hat for part in x.split(rows_at_a_time(sae))])


def rows_at_a_time(sae: Sae) -> int:
    """Return how many rows to encode at a time so that memory stays bounded at any SAE width."""
    return max(FEWEST_ROWS, LATENT_ENTRIES[sae.device.type] // sae.d_sae)
