"""Find the entries of a batch's pre-activations that are above a threshold, on a CPU, by the maxima of groups.

Checking every entry costs 2 ns per entry. The maxima of groups cost a tenth of that, and only groups whose maximum is
above the threshold are searched. Entries are returned by row, unsorted within a row.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ....shared.core.compute.cores import even_blocks, joined, on_cores
from ..entries import Entries
from .topk import INTEGER_DTYPE

_GROUP = 8
_SAMPLE = 1 << 16
_MOST_HITS = 1 / 2


def entries_at_least(
    pre_acts: Float[Tensor, "batch d_sae"], floor: float, most_hits: float = _MOST_HITS
) -> Entries | None:
    """Return indices and offsets of the entries that are at least `floor`, which is positive.

    Returns None if more than a fraction `most_hits` of the groups have one, or if the latents cannot be grouped.
    """
    found = _search(pre_acts, floor, most_hits)
    return None if found is None else _csr(*found[:2], len(pre_acts))


def largest_of_batch(pre_acts: Float[Tensor, "batch d_sae"], n_kept: int) -> Entries | None:
    """Return indices and offsets of the batch's `n_kept` largest positive entries, including ties with the smallest.

    A sample gives a lower bound that rarely fails. Returns None in the cases of `entries_at_least`.
    """
    flat = pre_acts.reshape(-1)
    stride = max(1, len(flat) // _SAMPLE)
    sample, rank = flat[::stride], 2 * n_kept // stride + 64
    smallest = torch.finfo(pre_acts.dtype).smallest_normal
    bound = float(sample.kthvalue(len(sample) - rank + 1).values) if rank < len(sample) else smallest
    found = _search(pre_acts, max(bound, smallest), _MOST_HITS)
    if found is not None and len(found[0]) < n_kept and bound > smallest:
        found = _search(pre_acts, smallest, _MOST_HITS)
    if found is None:
        return None
    rows, columns, values = found
    if len(values) > n_kept:
        ranked = np.partition(values.numpy(), len(values) - n_kept)
        kept = (values >= int(ranked[len(values) - n_kept])).nonzero().squeeze(1)
        rows, columns = rows[kept], columns[kept]
    return _csr(rows, columns, len(pre_acts))


def _search(pre_acts: Tensor, floor: float, most_hits: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return rows, columns and bits of the entries that are at least `floor`, row by row."""
    n_rows, d_sae = pre_acts.shape
    if pre_acts.dtype not in INTEGER_DTYPE or d_sae % _GROUP or not len(pre_acts):
        return None
    bits = pre_acts.view(INTEGER_DTYPE[pre_acts.dtype])
    least = int(pre_acts.new_tensor(floor).view(bits.dtype))
    stride = d_sae // _GROUP
    blocks = even_blocks(n_rows, 512)
    above = on_cores(lambda block: bits[block].unflatten(1, (_GROUP, stride)).amax(1) >= least, blocks)
    if sum(on_cores(lambda groups: int(torch.count_nonzero(groups)), above)) > most_hits * n_rows * stride:
        return None

    def search(number: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, groups = above[number].nonzero(as_tuple=True)
        rows += blocks[number].start
        members = bits.view(-1)[(rows * d_sae + groups)[:, None] + torch.arange(0, d_sae, stride)]
        hits, places = (members >= least).nonzero(as_tuple=True)
        return rows[hits], groups[hits] + places * stride, members[hits, places]

    rows, columns, values = joined(on_cores(search, range(len(blocks))))
    return rows, columns, values


def _csr(rows: Tensor, columns: Tensor, n_rows: int) -> Entries:
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(rows, minlength=n_rows), 0, out=offsets[1:])
    return Entries(columns, offsets)
