"""A weight matrix's gradient on a CPU, computed one block of latents at a time when the optimizer reads it.

A block is used while it is in cache and is never written to memory, which would cost more than the sums themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ..across import Across
from .csc import Csc, csc_of, row_of_entry


class WeightGradient:
    """`values^T source`, plus an outer product and rows of some latents.

    Each latent's sum is over its entries in order of row, with terms in the precision of `source`, accumulated in
    float32 or wider. Indexing with a slice of latents returns new rows, which the caller may change.
    """

    def __init__(self, csc: Csc, values: Float[Tensor, " nnz"], source: Float[Tensor, "batch d"]):
        self.dtype = values.dtype
        self.shape = torch.Size([len(csc.offsets) - 1, source.shape[1]])
        self.n_entries = len(values)
        self._csc, self._source = csc, source
        self._weights = values.index_select(0, csc.order).to(source.dtype)
        self._share = 1.0
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
        if self._share != 1:
            block *= self._share
        for by_latent, direction in self._outer:
            block.addr_(by_latent[start:stop], direction)
        for which, rows in self._rows:
            lo, hi = torch.searchsorted(which, torch.tensor([start, stop])).tolist()
            block.index_add_(0, which[lo:hi] - start, rows[lo:hi].to(self.dtype))
        return block

    def means_of_ranks(self, others: Sequence[WeightGradient], across: Across) -> list[WeightGradient]:
        """Return the means over ranks of this gradient and of others of the same entries, deferred as well."""
        gradients, n_rows = [self, *others], len(self._source)
        n_ranks = across.rows(n_rows) // n_rows
        rows = self._csc.rows + across.rows_before(n_rows)
        columns = [row_of_entry(self._csc.offsets).int(), rows.int(), *(one._weights for one in gradients)]
        latents, rows, *weights = _all_entries(columns, across)
        csc = csc_of(latents.long(), rows.long(), len(self))
        sources = across.all_rows(*(one._source for one in gradients))
        means = []
        for one, values, source in zip(gradients, weights, sources, strict=True):
            mean = WeightGradient(csc, values, source)
            mean.dtype, mean._share = one.dtype, one._share / n_ranks
            mean._outer, mean._rows = one._outer, one._rows
            across.over_rows(*(by_latent for by_latent, _ in mean._outer), *(rows for _, rows in mean._rows))
            for part in (*(by_latent for by_latent, _ in mean._outer), *(rows for _, rows in mean._rows)):
                part /= n_ranks
            means.append(mean)
        return means


def _all_entries(columns: Sequence[Tensor], across: Across) -> list[Tensor]:
    """Return all ranks' entries, given columns of those of this rank, in one exchange."""
    packed = torch.cat([column[:, None].view(torch.uint8) for column in columns], 1)
    parts = across.all_values(packed).split([column.element_size() for column in columns], 1)
    return [part.contiguous().view(own.dtype).squeeze(1) for part, own in zip(parts, columns, strict=True)]


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
