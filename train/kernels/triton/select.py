"""TopK selection in the epilogue of the encoder's GEMM: [batch, d_sae] never reaches memory.

1. `candidates`: a program computes a tile of pre-activations and keeps each row's `n_candidates` largest.
2. `merge`: a row's exact top k over all its tiles' candidates, with a certificate: what a tile did not
   list is below the last it listed, so if no tile's last is above the row's k-th, nothing was missed.
3. `recompute`: blocks of rows in which a certificate failed are done again with k candidates from every
   part of the dictionary, into the candidates' own memory, and merged again. Exact, however many fail.

Ties go to the lower latent. Nothing waits for the host.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor

from .tile import LOWEST_KEY, grouped_tile, key_column, key_value, pre_activation_tile, sortable_key, tile_registers


class SelectTiling(NamedTuple):
    """The tile sizes of a selection."""

    n_candidates: int
    rows: int = 128
    latents: int = 128
    d: int = 64
    redo_rows: int = 16
    redo_latents: int = 128


MAX_CANDIDATES = 32
MAX_RECOMPUTED = 1e-3
"""The share of rows that may be expected to fail the certificate."""
MAX_K = 128


def select_tiling(d_sae: int, k: int, dtype: torch.dtype = torch.bfloat16) -> SelectTiling | None:
    """Choose the fewest candidates per tile for which less than `MAX_RECOMPUTED` of rows fail, if latents fire alike.

    A tile then holds Poisson(k * latents / d_sae) of a row's top k. None where a dense selection is cheaper. Float32
    has smaller tiles, for its products are formed in registers, of which larger ones would spill.
    """
    tiling = SelectTiling(n_candidates=2)
    if dtype == torch.float32:
        tiling = SelectTiling(n_candidates=2, rows=64, latents=64, d=32, redo_latents=64)
    n_tiles = math.ceil(d_sae / tiling.latents)
    rate = k / n_tiles
    n = tiling.n_candidates
    while n <= MAX_CANDIDATES:
        at_least_n = 1.0 - math.exp(-rate) * sum(rate**i / math.factorial(i) for i in range(n))
        if n_tiles * at_least_n < MAX_RECOMPUTED and n_tiles * n >= padded_k(k):
            break
        n += 1
    if k > MAX_K or n > MAX_CANDIDATES:
        return None
    return tiling._replace(n_candidates=n, redo_latents=max(tiling.redo_latents, padded_k(k)))


def padded_k(k: int) -> int:
    """Return the power of two, at least 2, that sorting `k` entries takes."""
    return max(2, triton.next_power_of_2(k))


@triton.jit
def candidates_kernel(
    x_ptr,
    W_ptr,
    b_ptr,
    keys_ptr,
    n_rows,
    d_sae,
    d_in,
    stride_x,
    stride_W,
    N_CANDIDATES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n_tiles = tl.cdiv(d_sae, BLOCK_LATENTS)
    row_block, tile = grouped_tile(tl.cdiv(n_rows, BLOCK_ROWS), n_tiles, 8)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    within = tl.arange(0, BLOCK_LATENTS)
    columns = tile * BLOCK_LATENTS + within
    z = pre_activation_tile(
        x_ptr, W_ptr, b_ptr, rows, columns, n_rows, d_sae, d_in, stride_x, stride_W, BLOCK_ROWS, BLOCK_LATENTS, BLOCK_D
    )
    starts = (rows.to(tl.int64) * n_tiles + tile) * N_CANDIDATES
    for slot in range(N_CANDIDATES):
        # Two plain reductions hold fewer registers than one over (value, place) pairs.
        value = tl.max(z, axis=1)
        place = tl.min(tl.where(z == value[:, None], within[None, :], BLOCK_LATENTS - 1), axis=1)
        key = sortable_key(value, tile * BLOCK_LATENTS + place)
        tl.store(keys_ptr + starts + slot, key, mask=rows < n_rows)
        z = tl.where(within[None, :] == place[:, None], float("-inf"), z)


@triton.jit
def merge_kernel(
    keys_ptr,
    failed_ptr,
    top_acts_ptr,
    top_indices_ptr,
    n_keys,
    stride_keys,
    d_sae,
    k,
    N_CANDIDATES: tl.constexpr,
    K_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    REDO: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if REDO:  # noqa: SIM102
        if tl.load(failed_ptr + row) == 0:
            return
    best = tl.full([K_PADDED], LOWEST_KEY, tl.int64)
    bounds = tl.full([CHUNK], LOWEST_KEY, tl.int64)
    for start in range(0, n_keys, CHUNK):
        place = start + tl.arange(0, CHUNK)
        keys = tl.load(keys_ptr + row * stride_keys + place, mask=place < n_keys, other=LOWEST_KEY)
        bounds = tl.maximum(bounds, tl.where(place % N_CANDIDATES == N_CANDIDATES - 1, keys, LOWEST_KEY))
        part = tl.topk(keys, K_PADDED)
        best = tl.topk(tl.reshape(tl.join(best, part), [2 * K_PADDED]), K_PADDED)
    slots = tl.arange(0, K_PADDED)
    value = key_value(best)
    # A NaN stays one: the trainer must see it.
    tl.store(top_acts_ptr + row * k + slots, tl.where(value < 0, 0.0, value), mask=slots < k)
    tl.store(top_indices_ptr + row * k + slots, tl.minimum(key_column(best), d_sae - 1), mask=slots < k)
    if not REDO:
        bound = tl.max(bounds, axis=0)
        kth = tl.max(tl.where(slots == k - 1, best, LOWEST_KEY), axis=0)
        # What is not positive becomes 0 whichever latent it is.
        missed = (bound > kth) & (key_value(bound) > 0)
        tl.store(failed_ptr + row, missed.to(tl.int32))


@triton.jit
def recompute_kernel(
    x_ptr,
    W_ptr,
    b_ptr,
    failed_ptr,
    keys_ptr,
    n_rows,
    d_sae,
    d_in,
    stride_x,
    stride_W,
    stride_keys,
    n_parts,
    K_PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1)
    failed = tl.load(failed_ptr + rows, mask=rows < n_rows, other=0)
    if tl.max(failed, axis=0) == 0:
        return
    best = tl.full([BLOCK_ROWS, K_PADDED], LOWEST_KEY, tl.int64)
    for tile in range(part, tl.cdiv(d_sae, BLOCK_LATENTS), n_parts):
        columns = tile * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)
        z = pre_activation_tile(
            x_ptr,
            W_ptr,
            b_ptr,
            rows,
            columns,
            n_rows,
            d_sae,
            d_in,
            stride_x,
            stride_W,
            BLOCK_ROWS,
            BLOCK_LATENTS,
            BLOCK_D,
        )
        top = tl.topk(sortable_key(z, columns[None, :]), K_PADDED)
        best = tl.topk(tl.reshape(tl.join(best, top), [BLOCK_ROWS, 2 * K_PADDED]), K_PADDED)
    place = part * K_PADDED + tl.arange(0, K_PADDED)
    at = keys_ptr + rows.to(tl.int64)[:, None] * stride_keys + place[None, :]
    tl.store(at, best, mask=(failed != 0)[:, None])


def select_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    tiling: SelectTiling | None = None,
) -> tuple[Float[Tensor, "batch k"], Int32[Tensor, "batch k"]]:
    """Return the `k` largest latents of each row, ReLU'd and descending, and which they are.

    `x` and `W_enc` share a type: bfloat16 runs on tensor cores, float32 is exact and slow.
    """
    top_acts, top_indices, _ = select_topk_certified(x, W_enc, b_enc, k, tiling)
    return top_acts, top_indices


def select_topk_certified(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    tiling: SelectTiling | None = None,
) -> tuple[Float[Tensor, "batch k"], Int32[Tensor, "batch k"], Int32[Tensor, " batch"]]:
    """Return what `select_topk` does, and 1 for each row that the certificate sent back to be recomputed."""
    n_rows, d_in = x.shape
    d_sae = len(W_enc)
    assert 0 < k <= d_sae
    assert x.dtype == W_enc.dtype
    assert x.stride(1) == W_enc.stride(1) == 1
    tiling = tiling or select_tiling(d_sae, k, x.dtype)
    failed = torch.zeros(n_rows, dtype=torch.int32, device=x.device)
    if tiling is None:
        return *select_topk_dense(x, W_enc, b_enc, k), failed
    top_acts = torch.empty(n_rows, k, dtype=torch.float32, device=x.device)
    top_indices = torch.empty(n_rows, k, dtype=torch.int32, device=x.device)
    if n_rows == 0:
        return top_acts, top_indices, failed
    K_PADDED = padded_k(k)
    n_tiles = triton.cdiv(d_sae, tiling.latents)
    n_keys = n_tiles * tiling.n_candidates
    assert n_keys >= K_PADDED
    keys = torch.empty(n_rows, n_keys, dtype=torch.int64, device=x.device)
    candidates_kernel[(triton.cdiv(n_rows, tiling.rows) * n_tiles,)](
        x,
        W_enc,
        b_enc,
        keys,
        n_rows,
        d_sae,
        d_in,
        x.stride(0),
        W_enc.stride(0),
        N_CANDIDATES=tiling.n_candidates,
        BLOCK_ROWS=tiling.rows,
        BLOCK_LATENTS=tiling.latents,
        BLOCK_D=tiling.d,
        num_warps=8,
        num_stages=3,
        maxnreg=tile_registers(x.device),
    )

    def merge(n_merged: int, redo: bool) -> None:
        merge_kernel[(n_rows,)](
            keys,
            failed,
            top_acts,
            top_indices,
            n_merged,
            n_keys,
            d_sae,
            k,
            N_CANDIDATES=tiling.n_candidates,
            K_PADDED=K_PADDED,
            CHUNK=merge_chunk(n_merged, K_PADDED),
            REDO=redo,
            num_warps=merge_warps(redo),
        )

    merge(n_keys, redo=False)
    n_parts = n_keys // K_PADDED
    recompute_kernel[(triton.cdiv(n_rows, tiling.redo_rows), n_parts)](
        x,
        W_enc,
        b_enc,
        failed,
        keys,
        n_rows,
        d_sae,
        d_in,
        x.stride(0),
        W_enc.stride(0),
        n_keys,
        n_parts,
        K_PADDED=K_PADDED,
        BLOCK_ROWS=tiling.redo_rows,
        BLOCK_LATENTS=tiling.redo_latents,
        BLOCK_D=tiling.d,
        num_warps=4,
        num_stages=3,
    )
    merge(n_parts * K_PADDED, redo=True)
    return top_acts, top_indices, failed


def merge_chunk(n_keys: int, K_PADDED: int) -> int:
    """Return how many keys a merging program sorts at once."""
    return max(K_PADDED, min(triton.next_power_of_2(n_keys), 1024))


def merge_warps(redo: bool) -> int:
    """Return the warps of a merging program; with another number one of the two spills on sm_80 or sm_90."""
    return 8 if redo else 4


def select_topk_dense(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    block_bytes: int = 1 << 28,
) -> tuple[Float[Tensor, "batch k"], Int32[Tensor, "batch k"]]:
    """Select by plain matrix products over blocks of rows, for a `k` that tiles' candidates cannot fill."""
    block = max(1, block_bytes // (4 * len(W_enc)))
    parts = [torch.topk((rows @ W_enc.T).float() + b_enc.float(), k, dim=1) for rows in x.split(block)]
    top_acts = torch.cat([part.values for part in parts])
    return top_acts.relu(), torch.cat([part.indices for part in parts]).int()
