"""A weight matrix's gradient on a CPU, computed one block of latents at a time when the optimizer reads it.

A block is used while it is in cache and is never written to memory, which would cost more than the sums themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from .csc import Csc


class WeightGradient:
    """`values^T source`, plus an outer product and rows of some latents.

    Each latent's sum is over its entries in order of row, with terms in the precision of `source`, accumulated in
    float32 or wider. Indexing with a slice of latents returns new rows, which the caller may change.
    """

    def __init__(self, csc: Csc, values: Float[Tensor, " nnz"], source: Float[Tensor, "batch d"]):
        self.dtype = values.dtype
        self.shape = torch.Size([len(csc.offsets) - 1, source.shape[1]])
        self._csc, self._source = csc, source
        self._weights = values.index_select(0, csc.order).to(source.dtype)
        self._outer: list[tuple[Tensor, Tensor]] = []
        self._rows: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return self.shape[0]

    def add_outer(self, by_latent: Float[Tensor, " d_sae"], direction: Float[Tensor, " d"], alpha: float) -> None:
        """Add `alpha by_latent direction^T`; both are copied, because the optimizer changes parameters meanwhile."""
        self._outer.append((by_latent * alpha, direction.clone()))

    def add_rows(self, latents: Int64[Tensor, " n"], rows: Float[Tensor, "n d"]) -> None:
        """Add a row to each of some latents, given in ascending order."""
        self._rows.append((latents, rows))

    def __getitem__(self, latents: slice) -> Float[Tensor, "n d"]:
        start, stop, _ = latents.indices(len(self))
        offsets = self._csc.offsets[start : stop + 1]
        block = weighted_sums(self._source, self._csc.rows, offsets, self._weights).to(self.dtype)
        for by_latent, direction in self._outer:
            block.addr_(by_latent[start:stop], direction)
        for which, rows in self._rows:
            lo, hi = torch.searchsorted(which, torch.tensor([start, stop])).tolist()
            block.index_add_(0, which[lo:hi] - start, rows[lo:hi].to(self.dtype))
        return block


def weighted_sums(
    source: Float[Tensor, "m d"],
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " n_plus_1"],
    weights: Float[Tensor, " nnz"],
) -> Float[Tensor, "n d"]:
    """Return the sums of weighted rows of `source` over the entries between consecutive offsets."""
    first, last = int(offsets[0]), int(offsets[-1])
    return F.embedding_bag(
        indices[first:last],
        source,
        offsets - first,
        mode="sum",
        per_sample_weights=weights[first:last],
        include_last_offset=True,
    )
