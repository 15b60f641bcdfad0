"""TopK selection in the epilogue of the encoder's GEMM: [batch, d_sae] never reaches memory.

1. `candidates`: a program computes a tile of pre-activations and keeps each row's `n_candidates` largest.
2. `merge` (`merge.py`): a row's exact top k over all its tiles' candidates, with a certificate: what a tile did not
   list comes after the last it listed, so if no tile's last is before the row's k-th, nothing was missed.
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

from .merge import merge
from .tile import NO_KEY, grouped_tile, n_resident, ordered_bits, pre_activation_tile, tile_registers, wide_key


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
    return max(2, 1 << (k - 1).bit_length())


def recompute_registers(column_bits: int) -> int | None:
    """Return the registers a thread of `recompute` may have: of packed keys as many as let two programs share an SM.

    Left to itself, ptxas aims at three and spills at k = 128. Wide keys take all there are.
    """
    return 224 if column_bits > 0 else None


@triton.jit
def candidates_kernel(
    x_ptr,
    W_ptr,
    b_ptr,
    keys_ptr,
    n_failed_ptr,
    n_rows,
    d_sae,
    d_in,
    stride_x,
    stride_W,
    stride_keys,
    N_CANDIDATES: tl.constexpr,
    COLUMN_BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if tl.program_id(0) == 0:
        tl.store(n_failed_ptr, 0)  # which merge adds to
    n_tiles = tl.cdiv(d_sae, BLOCK_LATENTS)
    row_block, tile = grouped_tile(tl.cdiv(n_rows, BLOCK_ROWS), n_tiles, 8)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    within = tl.arange(0, BLOCK_LATENTS)
    columns = tile * BLOCK_LATENTS + within
    z = pre_activation_tile(
        x_ptr, W_ptr, b_ptr, rows, columns, n_rows, d_sae, d_in, stride_x, stride_W, BLOCK_ROWS, BLOCK_LATENTS, BLOCK_D
    )
    if COLUMN_BITS > 0:
        keys = ordered_bits(z, COLUMN_BITS) | (BLOCK_LATENTS - 1 - within)[None, :]
    else:
        keys = wide_key(ordered_bits(z, 0), columns[None, :])
    starts = rows.to(tl.int64) * stride_keys + tile * N_CANDIDATES
    for slot in range(N_CANDIDATES):
        # No two keys of a row are equal, so a maximum is all that is needed to find and to remove the largest.
        largest = tl.max(keys, axis=1)
        tl.store(keys_ptr + starts + slot, largest, mask=rows < n_rows)
        keys = tl.where(keys == largest[:, None], NO_KEY, keys)


@triton.jit
def recompute_kernel(
    x_ptr,
    W_ptr,
    b_ptr,
    failed_ptr,
    n_failed_ptr,
    keys_ptr,
    n_rows,
    d_sae,
    d_in,
    stride_x,
    stride_W,
    stride_keys,
    n_parts,
    K_PADDED: tl.constexpr,
    COLUMN_BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if tl.load(n_failed_ptr) == 0:
        return
    n_tiles = tl.cdiv(d_sae, BLOCK_LATENTS)
    # Parts are of neighbouring tiles, so that the first of two equal values is that of the lower latent.
    tiles_a_part = tl.cdiv(n_tiles, n_parts)
    for turn in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS) * n_parts, tl.num_programs(0)):
        rows = turn // n_parts * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        part = turn % n_parts
        failed = tl.load(failed_ptr + rows, mask=rows < n_rows, other=0)
        if tl.max(failed, axis=0) != 0:
            best = tl.full([BLOCK_ROWS, K_PADDED], NO_KEY, tl.int64)
            for tile in range(part * tiles_a_part, tl.minimum((part + 1) * tiles_a_part, n_tiles)):
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
                top = tl.topk(wide_key(ordered_bits(z, COLUMN_BITS), columns[None, :]), K_PADDED)
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
    """Return the `k` largest latents of each row, ReLU'd, and which they are, in no order.

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
    """Return what `select_topk` does, and 1 for each row that the certificate sent back to be recomputed.

    From bfloat16, values are rounded half up to the 24 bits of a float32 less those that a column of a tile takes: 17.
    """
    n_rows, d_in = x.shape
    d_sae = len(W_enc)
    assert 0 < k <= d_sae
    assert x.dtype == W_enc.dtype
    assert x.stride(1) == W_enc.stride(1) == 1
    tiling = tiling or select_tiling(d_sae, k, x.dtype)
    if tiling is None:
        return *select_topk_dense(x, W_enc, b_enc, k), torch.zeros(n_rows, dtype=torch.int32, device=x.device)
    top_acts = torch.empty(n_rows, k, dtype=torch.float32, device=x.device)
    top_indices = torch.empty(n_rows, k, dtype=torch.int32, device=x.device)
    failed = torch.empty(n_rows, dtype=torch.int32, device=x.device)
    if n_rows == 0:
        return top_acts, top_indices, failed
    n_failed = torch.empty(1, dtype=torch.int32, device=x.device)
    K_PADDED = padded_k(k)
    n_tiles = triton.cdiv(d_sae, tiling.latents)
    n_keys = n_tiles * tiling.n_candidates
    assert n_keys >= k
    wide = x.dtype == torch.float32
    column_bits = 0 if wide else tiling.latents.bit_length() - 1
    # What is recomputed is wide, and takes the same memory.
    stride = max(n_keys, K_PADDED if wide else 2 * K_PADDED)
    stride = triton.cdiv(stride, 16) * 16
    keys = torch.empty(n_rows, stride, dtype=torch.int64 if wide else torch.int32, device=x.device)
    candidates_kernel[(triton.cdiv(n_rows, tiling.rows) * n_tiles,)](
        x,
        W_enc,
        b_enc,
        keys,
        n_failed,
        n_rows,
        d_sae,
        d_in,
        x.stride(0),
        W_enc.stride(0),
        stride,
        N_CANDIDATES=tiling.n_candidates,
        COLUMN_BITS=column_bits,
        BLOCK_ROWS=tiling.rows,
        BLOCK_LATENTS=tiling.latents,
        BLOCK_D=tiling.d,
        num_warps=8,
        num_stages=3,
        maxnreg=tile_registers(x.device),
    )
    found = (failed, n_failed, top_acts, top_indices, d_sae, tiling.n_candidates)
    merge(keys, n_keys, *found, column_bits, redo=False)
    wide_keys = keys.view(torch.int64)
    n_parts = wide_keys.shape[1] // K_PADDED
    n_turns = triton.cdiv(n_rows, tiling.redo_rows) * n_parts
    recompute_kernel[(n_resident(x.device, n_turns),)](
        x,
        W_enc,
        b_enc,
        failed,
        n_failed,
        wide_keys,
        n_rows,
        d_sae,
        d_in,
        x.stride(0),
        W_enc.stride(0),
        wide_keys.stride(0),
        n_parts,
        K_PADDED=K_PADDED,
        COLUMN_BITS=column_bits,
        BLOCK_ROWS=tiling.redo_rows,
        BLOCK_LATENTS=tiling.redo_latents,
        BLOCK_D=tiling.d,
        num_warps=4,
        num_stages=3,
        maxnreg=recompute_registers(column_bits),
    )
    merge(wide_keys, n_parts * K_PADDED, *found, 0, redo=True)
    return top_acts, top_indices, failed


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
