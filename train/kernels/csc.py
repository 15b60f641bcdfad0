"""Sort the entries of a sparse matrix by latent, and split latents with many entries into segments.

Everything stays on the device: a stable sort and two binary searches, without a count that the host would wait for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor

MAX_SEGMENT = 256


class SegmentedCsc(NamedTuple):
    """Entries by latent: those of latent i are `order[starts[i]:starts[i + 1]]`, in the order of their rows.

    A latent with more than `max_segment` entries is hot: its entries are split into segments `segment_starts[i]` to
    `segment_starts[i + 1]`, which are summed separately. `segment_latents` holds the latent of each segment.
    """

    order: Int64[Tensor, " nnz"]
    rows: Int32[Tensor, " nnz"]
    starts: Int64[Tensor, " d_sae_plus_1"]
    segment_starts: Int64[Tensor, " d_sae_plus_1"]
    segment_latents: Int64[Tensor, " n_segments"]
    max_segment: int


def to_csc(
    indices: Int[Tensor, " nnz"], offsets: Int[Tensor, " batch_plus_1"], d_sae: int, max_segment: int = MAX_SEGMENT
) -> SegmentedCsc:
    """Sort entries by latent; entries from `offsets[-1]` on belong to no latent.

    There are at most `2 * nnz / max_segment` segments, because only the last segment of a hot latent is not full.
    """
    nnz, device = len(indices), indices.device
    entries = torch.arange(nnz, device=device)
    # The time of a radix sort is proportional to the width of its keys.
    latents = torch.where(entries < offsets[-1], indices.int(), d_sae)
    by_latent, order = torch.sort(latents, stable=True)
    starts = torch.searchsorted(by_latent, torch.arange(d_sae + 1, dtype=torch.int32, device=device))
    rows = (torch.searchsorted(offsets.long(), order, right=True) - 1).clamp_(max=len(offsets) - 2).int()
    counts = starts.diff()
    n_segments = torch.where(counts > max_segment, (counts + max_segment - 1) // max_segment, 0)
    segment_starts = torch.nn.functional.pad(n_segments.cumsum(0), (1, 0))
    capacity = 2 * nnz // max_segment + 1
    segments = torch.arange(capacity, device=device)
    segment_latents = (torch.searchsorted(segment_starts, segments, right=True) - 1).clamp_(max=d_sae - 1)
    return SegmentedCsc(order, rows, starts, segment_starts, segment_latents, max_segment)
