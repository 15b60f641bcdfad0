"""Sort the entries of a sparse matrix by latent: a radix sort of narrow keys, and a kernel on either side of it.

Everything stays on the device, without a count that the host would wait for.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from ..csc import MAX_SEGMENT, SegmentedCsc

_BLOCK = 256


@triton.jit
def keys_kernel(indices_ptr, offsets_ptr, keys_ptr, n_rows, nnz, d_sae, lowest, BLOCK: tl.constexpr):
    """Write the entries' keys; those past the last row have that of a latent past the last."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(indices_ptr + entry, mask=entry < nnz, other=0).to(tl.int32)
    latent = tl.where(entry < tl.load(offsets_ptr + n_rows).to(tl.int64), latent, d_sae)
    tl.store(keys_ptr + entry, (latent + lowest).to(keys_ptr.dtype.element_ty), mask=entry < nnz)


@triton.jit
def count_below(sorted_ptr, n, limit, n_bits):
    """Return how many of `n < 2**n_bits` sorted integers are below each limit."""
    found = tl.zeros_like(limit)
    for number in range(n_bits):
        trial = found + (tl.full([], 1, tl.int64) << (n_bits - 1 - number))
        last = tl.load(sorted_ptr + trial - 1, mask=trial <= n, other=0).to(tl.int64)
        found = tl.where((trial <= n) & (last < limit), trial, found)
    return found


@triton.jit
def places_kernel(
    keys_ptr,
    order_ptr,
    offsets_ptr,
    starts_ptr,
    rows_ptr,
    n_rows,
    nnz,
    d_sae,
    lowest,
    key_bits,
    row_bits,
    BLOCK: tl.constexpr,
):
    """Write where each latent's entries start, in the first programs, and each entry's row, in the others."""
    n_blocks = tl.cdiv(d_sae + 1, BLOCK)
    program = tl.program_id(0)
    if program < n_blocks:
        latent = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(starts_ptr + latent, count_below(keys_ptr, nnz, latent + lowest, key_bits), mask=latent <= d_sae)
    else:
        place = (program - n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        entry = tl.load(order_ptr + place, mask=place < nnz, other=0)
        row = count_below(offsets_ptr, n_rows + 1, entry + 1, row_bits) - 1
        tl.store(rows_ptr + place, tl.minimum(row, n_rows - 1).to(tl.int32), mask=place < nnz)


def to_csc(
    indices: Int[Tensor, " nnz"], offsets: Int[Tensor, " batch_plus_1"], d_sae: int, max_segment: int = MAX_SEGMENT
) -> SegmentedCsc:
    """Sort entries by latent; entries from `offsets[-1]` on belong to no latent.

    The time of a radix sort is proportional to the width of its keys: they have 16 bits where these are enough.
    """
    nnz, n_rows, device = len(indices), len(offsets) - 1, indices.device
    narrow = d_sae < 1 << 16
    lowest = -(1 << 15) if narrow else 0
    keys = torch.empty(nnz, dtype=torch.int16 if narrow else torch.int32, device=device)
    starts = torch.empty(d_sae + 1, dtype=torch.int64, device=device)
    rows = torch.empty(nnz, dtype=torch.int32, device=device)
    n_blocks = triton.cdiv(nnz, _BLOCK)
    if nnz:
        keys_kernel[(n_blocks,)](indices, offsets, keys, n_rows, nnz, d_sae, lowest, BLOCK=_BLOCK)
    keys, order = torch.sort(keys, stable=True)
    places_kernel[(triton.cdiv(d_sae + 1, _BLOCK) + n_blocks,)](
        keys,
        order,
        offsets,
        starts,
        rows,
        n_rows,
        nnz,
        d_sae,
        lowest,
        nnz.bit_length(),
        (n_rows + 1).bit_length(),
        BLOCK=_BLOCK,
    )
    return SegmentedCsc(order, rows, starts, keys, max_segment)
