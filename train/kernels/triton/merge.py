"""The k largest of a row's keys: bisection on the values' bits, and one cumulative sum for the places.

Keys are of two kinds. A packed one is an int32: a value's bits, the lowest of which are the complement of its column in
the tile that listed it. A wide one is an int64, of all the bits and the complement of the latent. In both cases
keys of equal values lie in the order of their latents, so a tie goes to the earlier place.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor

from .tile import NO_KEY, n_resident, wide_key_column

MAX_HELD_KEYS = 16_384
"""The keys of a row that a program holds in registers; it reads more in every trial."""


@triton.jit
def keys_and_values(row_ptr, place, n_keys, COLUMN_BITS: tl.constexpr):
    """Return keys and their values as integers in the order of the values; NO_KEY and -1 past the last."""
    keys = tl.load(row_ptr + place, mask=place < n_keys, other=NO_KEY)
    return keys, (keys >> (COLUMN_BITS if COLUMN_BITS > 0 else 32)).to(tl.int32)


@triton.jit
def merge_row(
    row,
    keys_ptr,
    top_acts_ptr,
    top_indices_ptr,
    n_keys,
    stride_keys,
    d_sae,
    k,
    N_CANDIDATES: tl.constexpr,
    COLUMN_BITS: tl.constexpr,
    KEYS: tl.constexpr,
    PLACED: tl.constexpr,
    HELD: tl.constexpr,
):
    """Store the k largest of a row's keys; return whether a tile may have had one that it did not list."""
    row_ptr = keys_ptr + row * stride_keys
    places = tl.arange(0, KEYS)
    if HELD:
        _, held = keys_and_values(row_ptr, places, n_keys, COLUMN_BITS)
    # The largest value that at least k keys reach, bit by bit; the last trial counts what is above it.
    N_BITS: tl.constexpr = 31 - COLUMN_BITS
    least = 0
    n_above = 0
    for number in range(N_BITS + 1):
        trial = tl.where(number < N_BITS, least | ((1 << (N_BITS - 1)) >> number), least + 1)
        if HELD:
            n_above = tl.sum((held >= trial).to(tl.int32), axis=0)
        else:
            n_above = 0
            for start in range(0, n_keys, KEYS):
                _, some = keys_and_values(row_ptr, start + places, n_keys, COLUMN_BITS)
                n_above += tl.sum((some >= trial).to(tl.int32), axis=0)
        least = tl.where((n_above >= k) & (number < N_BITS), trial, least)
    # Those above take the first slots and ties the others, both in the order of their places. Few at a time are placed,
    # from the cache: more would take too many registers.
    n_earlier = 0
    n_earlier_ties = 0
    missed = 0
    for start in range(0, n_keys, PLACED):
        place = start + tl.arange(0, PLACED)
        keys, values = keys_and_values(row_ptr, place, n_keys, COLUMN_BITS)
        above, tied = values > least, values == least
        both = above.to(tl.int32) + (tied.to(tl.int32) << 16)
        before = tl.cumsum(both, axis=0) - both
        slot = tl.where(above, n_earlier + (before & 0xFFFF), n_above + n_earlier_ties + (before >> 16))
        chosen = above | (tied & (slot < k))
        if COLUMN_BITS > 0:
            latent = (place // N_CANDIDATES << COLUMN_BITS) + (
                (1 << COLUMN_BITS) - 1 - (keys & ((1 << COLUMN_BITS) - 1))
            )
        else:
            latent = wide_key_column(keys)
        value = (values << COLUMN_BITS).to(tl.float32, bitcast=True)
        tl.store(top_acts_ptr + row * k + slot, value, mask=chosen)
        tl.store(top_indices_ptr + row * k + slot, tl.minimum(latent, d_sae - 1), mask=chosen)
        # What a tile did not list comes after the last that it did. What is not positive is 0 whichever latent it is.
        is_last = place % N_CANDIDATES == N_CANDIDATES - 1
        missed = tl.maximum(missed, tl.max((chosen & is_last & (values > 0) & (slot < k - 1)).to(tl.int32), axis=0))
        total = tl.sum(both, axis=0)
        n_earlier += total & 0xFFFF
        n_earlier_ties += total >> 16
    return missed


@triton.jit
def merge_kernel(
    keys_ptr,
    failed_ptr,
    n_failed_ptr,
    top_acts_ptr,
    top_indices_ptr,
    n_rows,
    n_keys,
    stride_keys,
    d_sae,
    k,
    N_CANDIDATES: tl.constexpr,
    COLUMN_BITS: tl.constexpr,
    KEYS: tl.constexpr,
    PLACED: tl.constexpr,
    HELD: tl.constexpr,
    REDO: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64)
    if REDO:
        if tl.load(n_failed_ptr) == 0:
            return
        for row in range(first, n_rows, tl.num_programs(0)):
            if tl.load(failed_ptr + row) != 0:
                merge_row(
                    row,
                    keys_ptr,
                    top_acts_ptr,
                    top_indices_ptr,
                    n_keys,
                    stride_keys,
                    d_sae,
                    k,
                    N_CANDIDATES,
                    COLUMN_BITS,
                    KEYS,
                    PLACED,
                    HELD,
                )
    else:
        missed = merge_row(
            first,
            keys_ptr,
            top_acts_ptr,
            top_indices_ptr,
            n_keys,
            stride_keys,
            d_sae,
            k,
            N_CANDIDATES,
            COLUMN_BITS,
            KEYS,
            PLACED,
            HELD,
        )
        tl.store(failed_ptr + first, missed)
        # A count of whole numbers is the same in any order.
        tl.atomic_add(n_failed_ptr, missed, mask=missed != 0, sem="relaxed")


def merge(
    keys: Int[Tensor, "batch n_keys"],
    n_keys: int,
    failed: Int32[Tensor, " batch"],
    n_failed: Int32[Tensor, " 1"],
    top_acts: Float[Tensor, "batch k"],
    top_indices: Int32[Tensor, "batch k"],
    d_sae: int,
    n_candidates: int,
    column_bits: int,
    redo: bool,
) -> None:
    """Write the `k` largest of the first `n_keys` keys of each row, in no order, and what latents they are.

    Flag and count the rows whose certificate fails; with `redo`, take only those, wherever their keys come from.
    """
    n_rows, k = top_acts.shape
    held = min(triton.next_power_of_2(n_keys), MAX_HELD_KEYS)
    num_warps = merge_warps(held, keys.dtype == torch.int64)
    merge_kernel[(n_resident(keys.device, n_rows) if redo else n_rows,)](
        keys,
        failed,
        n_failed,
        top_acts,
        top_indices,
        n_rows,
        n_keys,
        keys.stride(0),
        d_sae,
        k,
        N_CANDIDATES=n_candidates,
        COLUMN_BITS=column_bits,
        KEYS=held,
        PLACED=min(held, 256 * num_warps),
        HELD=n_keys <= held,
        REDO=redo,
        num_warps=num_warps,
    )


def merge_warps(n_held: int, wide: bool) -> int:
    """Return the warps that hold keys, 32 per thread or 16 wide ones."""
    return max(1, min(n_held * (2 if wide else 1) // 1024, 16))
