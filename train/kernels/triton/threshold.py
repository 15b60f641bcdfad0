"""Selection by threshold, as CSR: ReLU, JumpReLU with its band, Gated, and BatchTopK's filter.

1. `slots`: a program computes a tile of pre-activations, counts each row's entries above the threshold
   and keeps the first `n_slots` of them.
2. A cumulative sum over (row, tile) says where each tile's entries go.
3. `fill`: copies the slots there; a tile with a row that has more entries than slots is computed again,
   by the same instructions. Entries are ordered by row, then latent. Exact; [batch, d_sae] never exists.

With a `capacity` nothing waits for the host; entries past it are dropped and `offsets` still counts them,
so that the caller can detect this at its next poll (`offsets[-1] > capacity`). Unused places then hold
latent 0.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from ..entries import Selection
from .tile import grouped_tile, pre_activation_tile

SAMPLE_ROWS = 128
SAMPLE_RANKS = 64


class ThresholdTiling(NamedTuple):
    """The tile sizes of a threshold selection."""

    n_slots: int = 8
    rows: int = 128
    latents: int = 128
    d: int = 64


@triton.jit
def threshold_kernel(
    x_ptr,
    W_ptr,
    b_ptr,
    threshold_ptr,
    slot_values_ptr,
    slot_columns_ptr,
    counts_ptr,
    starts_ptr,
    values_ptr,
    indices_ptr,
    capacity,
    n_rows,
    d_sae,
    d_in,
    stride_x,
    stride_W,
    N_SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FILL: tl.constexpr,
):
    n_tiles = tl.cdiv(d_sae, BLOCK_LATENTS)
    row_block, tile = grouped_tile(tl.cdiv(n_rows, BLOCK_ROWS), n_tiles, 8)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Addresses are 64-bit where the block of rows starts and 32-bit within it, to spare registers.
    first_cell = row_block.to(tl.int64) * BLOCK_ROWS * n_tiles
    cells = tl.arange(0, BLOCK_ROWS) * n_tiles + tile
    slot_values_ptr += first_cell * N_SLOTS
    slot_columns_ptr += first_cell * N_SLOTS
    slots = tl.arange(0, N_SLOTS)
    if FILL:
        counts = tl.load(counts_ptr + first_cell + cells, mask=rows < n_rows, other=0)
        first_start = tl.load(starts_ptr + first_cell)
        starts = tl.load(starts_ptr + first_cell + cells, mask=rows < n_rows, other=0)
        starts = (starts - first_start).to(tl.int32)
        values_ptr += first_start
        indices_ptr += first_start
        room = tl.minimum(tl.maximum(capacity - first_start, 0), 0x7FFFFFFF).to(tl.int32)
        if tl.max(counts, axis=0) <= N_SLOTS:
            held = slots[None, :] < counts[:, None]
            source = cells[:, None] * N_SLOTS + slots[None, :]
            target = starts[:, None] + slots[None, :]
            kept = held & (target < room)
            tl.store(values_ptr + target, tl.load(slot_values_ptr + source, mask=held, other=0.0), mask=kept)
            tl.store(indices_ptr + target, tl.load(slot_columns_ptr + source, mask=held, other=0), mask=kept)
            return
    within = tl.arange(0, BLOCK_LATENTS)
    columns = tile * BLOCK_LATENTS + within
    z = pre_activation_tile(
        x_ptr, W_ptr, b_ptr, rows, columns, n_rows, d_sae, d_in, stride_x, stride_W, BLOCK_ROWS, BLOCK_LATENTS, BLOCK_D
    )
    threshold = tl.load(threshold_ptr + columns, mask=columns < d_sae, other=float("inf"))
    chosen = (z > threshold[None, :]) & (rows < n_rows)[:, None]
    if FILL:
        starts_out = starts
        n_out = tl.max(counts, axis=0)
        n_kept = tl.minimum(counts, room - starts)
    else:
        counts = tl.sum(chosen.to(tl.int32), axis=1)
        tl.store(counts_ptr + first_cell + cells, counts, mask=rows < n_rows)
        starts_out = cells * N_SLOTS
        n_out = tl.minimum(tl.max(counts, axis=0), N_SLOTS)
        n_kept = tl.minimum(counts, N_SLOTS)
        values_ptr = slot_values_ptr
        indices_ptr = slot_columns_ptr
    # One entry of every row at a time, lowest latent first: a scatter of the whole tile would spill.
    for number in range(n_out):
        place = tl.min(tl.where(chosen, within[None, :], BLOCK_LATENTS), axis=1)
        this = within[None, :] == place[:, None]
        value = tl.sum(tl.where(this, z, 0.0), axis=1)
        chosen = chosen & (within[None, :] > place[:, None])
        tl.store(values_ptr + starts_out + number, value, mask=number < n_kept)
        # Were the two launches ever to count differently, an index would still be one of a latent.
        latent = tl.minimum(tile * BLOCK_LATENTS + place, d_sae - 1)
        tl.store(indices_ptr + starts_out + number, latent, mask=number < n_kept)


def select_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"] | Float[Tensor, ""] | float,
    capacity: int | None = None,
    tiling: ThresholdTiling | None = None,
) -> Selection:
    """Return the latents whose pre-activation is above `threshold`: ReLU at 0, JumpReLU at theta.

    With `capacity` the buffers have that size, however many entries there are, and the host does not wait for the
    device; without, they have the exact size.
    """
    n_rows, d_in = x.shape
    d_sae = len(W_enc)
    assert x.dtype == W_enc.dtype
    assert x.stride(1) == W_enc.stride(1) == 1
    # Float32 products are formed in registers, of which larger tiles' would spill.
    tiling = tiling or (ThresholdTiling(rows=64, latents=64, d=32) if x.dtype == torch.float32 else ThresholdTiling())
    device = x.device
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, dtype=torch.float32, device=device)
    threshold = threshold.float().expand(d_sae).contiguous()
    n_tiles = triton.cdiv(d_sae, tiling.latents)
    n_cells = n_rows * n_tiles
    slot_values = torch.empty(n_cells, tiling.n_slots, dtype=torch.float32, device=device)
    slot_columns = torch.empty(n_cells, tiling.n_slots, dtype=torch.int32, device=device)
    counts = torch.empty(n_cells, dtype=torch.int32, device=device)
    starts = torch.zeros(n_cells + 1, dtype=torch.int64, device=device)

    def run(values: Tensor, indices: Tensor, fill: bool) -> None:
        threshold_kernel[(triton.cdiv(n_rows, tiling.rows) * n_tiles,)](
            x,
            W_enc,
            b_enc,
            threshold,
            slot_values,
            slot_columns,
            counts,
            starts,
            values,
            indices,
            len(values),
            n_rows,
            d_sae,
            d_in,
            x.stride(0),
            W_enc.stride(0),
            N_SLOTS=tiling.n_slots,
            BLOCK_ROWS=tiling.rows,
            BLOCK_LATENTS=tiling.latents,
            BLOCK_D=tiling.d,
            FILL=fill,
            num_warps=8,
            num_stages=3,
        )

    if n_rows:
        run(slot_values, slot_columns, fill=False)
    torch.cumsum(counts, 0, out=starts[1:])
    size = int(starts[-1]) if capacity is None else capacity
    values = torch.empty(size, dtype=torch.float32, device=device)
    empty = torch.empty if capacity is None else torch.zeros
    indices = empty(size, dtype=torch.int32, device=device)
    if n_rows:
        run(values, indices, fill=True)
    return Selection(values, indices, starts[::n_tiles].contiguous())


def batch_floor(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    margin: float = 1.25,
) -> Float[Tensor, ""]:
    """Return a value that is rarely above any of the batch's `batch * k` largest latents.

    It is that of rank `margin * k` a row among the latents of a sample of rows, or 0 where too few are positive.
    """
    sample = x[:: max(1, len(x) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    pre_acts = ((sample @ W_enc.T).float() + b_enc.float()).flatten()
    rank = math.ceil(margin * k * len(sample)) + SAMPLE_RANKS
    if rank >= len(pre_acts):
        return pre_acts.new_zeros(())
    return pre_acts.topk(rank, sorted=False).values.amin().clamp_min(0)


def select_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    floor: Float[Tensor, ""] | float = 0.0,
    capacity: int | None = None,
    tiling: ThresholdTiling | None = None,
) -> tuple[Selection, Float[Tensor, ""], Bool[Tensor, ""]]:
    """Return the `batch * k` largest positive latents of the whole batch (2412.06410), their least, and a certificate.

    Only latents above `floor` are candidates, which keeps them few: `batch_floor` is one. The certificate is true
    where that changed nothing: there were `batch * k` of them, or the floor was 0; and they fitted the capacity.
    Ties at the threshold go to the earlier row, then latent.
    """
    wanted = len(x) * k
    floor = torch.as_tensor(floor, dtype=torch.float32, device=x.device).clamp_min(0)
    found = select_threshold(x, W_enc, b_enc, floor, capacity, tiling)
    n_found, size = found.offsets[-1], len(found.values)
    entries = torch.arange(size, device=x.device)
    values = torch.where(entries < n_found, found.values, float("-inf"))
    if size < wanted:
        values = torch.nn.functional.pad(values, (0, wanted - size), value=float("-inf"))
    least = values.topk(wanted, sorted=False).values.amin() if wanted else values.new_zeros(())
    above = values > least
    level = (values == least) & (values > float("-inf"))
    chosen = above | (level & (level.cumsum(0) <= wanted - above.sum()))
    # Chosen entries keep their order; the others all land in one place past the end.
    n_before = torch.nn.functional.pad(chosen.cumsum(0), (1, 0))
    target = torch.where(chosen, n_before[:-1], wanted)
    chosen_values = values.new_zeros(wanted + 1).scatter_(0, target, values.where(chosen, 0.0))[:wanted]
    columns = torch.nn.functional.pad(found.indices, (0, len(values) - size))
    chosen_indices = columns.new_zeros(wanted + 1).scatter_(0, target, columns.where(chosen, 0))[:wanted]
    offsets = n_before[found.offsets.clamp(max=size)]
    certified = (n_found <= size) & ((n_found >= wanted) | (floor <= 0))
    least_kept = torch.where(offsets[-1] >= wanted, least, 0.0)
    return Selection(chosen_values, chosen_indices, offsets), least_kept, certified
