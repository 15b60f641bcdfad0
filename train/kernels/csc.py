"""Entries of a sparse matrix sorted by latent, as the sums over latents read them."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Int, Int32, Int64
from torch import Tensor

MAX_SEGMENT = 64


class SegmentedCsc(NamedTuple):
    """Entries by latent: those of latent i are `order[starts[i]:starts[i + 1]]`, in the order of their rows.

    `keys` are the sorted entries' latents, less a constant. Segments are the runs of `max_segment` entries that start
    at the multiples of it; those with a single latent are summed separately.
    """

    order: Int64[Tensor, " nnz"]
    rows: Int32[Tensor, " nnz"]
    starts: Int64[Tensor, " d_sae_plus_1"]
    keys: Int[Tensor, " nnz"]
    max_segment: int
