"""Parts that the Triton kernels share: one tile of pre-activations, keys that sort like values, and rows in registers.

A row is a tuple of parts. Of each, a thread loads 16 bytes in float32; the last part may be a smaller power of two. Of
768 channels and 128 threads they are 512 and 256, where a single part would be 1,024 wide and a quarter of the threads
idle. So rows of every type lie alike in the threads, and sums of rows do not cross them.

Hints for other readers: `tl.dot` accumulates in float32; row starts are 64-bit, because d_sae * d_in
passes 2^31 long before memory runs out; a masked load always names the value that changes nothing.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Multiply-adds are fused even if Triton's default changes, as 3.9 announces by a warning where this is not set.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

NO_KEY: tl.constexpr = tl.constexpr(-1)
"""A key below that of every value."""
# Triton's interpreter multiplies the bits of bfloat16 as integers; widened products are what tensor cores form anyway.
WIDEN: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


def tile_registers(device: torch.device) -> int | None:
    """Return the registers a thread of a 128 x 128 tile may have: on sm_90, where it is free, two programs then fit."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return 128
    return None


def n_resident(device: torch.device, n_programs: int) -> int:
    """Return how many programs to launch, each of which takes turns at the work of `n_programs`: four per SM."""
    n_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return min(n_programs, 4 * n_sms)


class RowTiling(NamedTuple):
    """How a program holds rows of `d_in`: how many at once, in parts of which widths, and over how many warps."""

    entries: int
    widths: tuple[int, ...]
    num_warps: int

    @property
    def launch(self) -> dict[str, Any]:
        """Return the keyword arguments of a launch."""
        return {"ENTRIES": self.entries, "WIDTHS": self.widths, "num_warps": self.num_warps}


def row_tiling(d_in: int) -> RowTiling:
    """Choose to hold the whole row, and as many rows at a time as fit in registers without spilling."""
    num_warps = 4 if d_in <= 1024 else 8 if d_in <= 8192 else 16
    # With fewer elements than threads, threads that share one could read what another has already written.
    n_whole, rest = divmod(d_in, 128 * num_warps)
    widths = (128 * num_warps,) * n_whole
    if rest:
        widths += (max(32 * num_warps, triton.next_power_of_2(rest)),)
    entries = max(1, min(16, num_warps * 1024 // triton.next_power_of_2(sum(widths))))
    return RowTiling(entries, widths, num_warps)


@triton.jit
def zero_row(WIDTHS: tl.constexpr):
    """Return a row of zeros."""
    row = ()
    for part in tl.static_range(len(WIDTHS)):
        row += (tl.zeros([tl.constexpr(WIDTHS[part])], tl.float32),)
    return row


@triton.jit
def load_row(row_ptr, d_in, WIDTHS: tl.constexpr):
    """Return the row of `d_in` channels at an address in float32; what is past them is 0."""
    row = ()
    for part in tl.static_range(len(WIDTHS)):
        d = part * WIDTHS[0] + tl.arange(0, WIDTHS[part])
        row += (tl.load(row_ptr + d, mask=d < d_in, other=0.0).to(tl.float32),)
    return row


@triton.jit
def store_row(row_ptr, row, d_in):
    """Store a row of `d_in` channels at an address, in the type of what is there."""
    for part in tl.static_range(len(row)):
        d = part * row[0].shape[0] + tl.arange(0, row[part].shape[0])
        tl.store(row_ptr + d, row[part].to(row_ptr.dtype.element_ty), mask=d < d_in)


@triton.jit
def zero_rows(ENTRIES: tl.constexpr, WIDTHS: tl.constexpr):
    """Return rows of zeros."""
    rows = ()
    for part in tl.static_range(len(WIDTHS)):
        rows += (tl.zeros([ENTRIES, tl.constexpr(WIDTHS[part])], tl.float32),)
    return rows


@triton.jit
def load_rows(row_ptrs, inside, d_in, WIDTHS: tl.constexpr):
    """Return the rows at some addresses in float32; zeros for those not `inside`."""
    rows = ()
    for part in tl.static_range(len(WIDTHS)):
        d = part * WIDTHS[0] + tl.arange(0, WIDTHS[part])
        mask = inside[:, None] & (d < d_in)[None, :]
        rows += (tl.load(row_ptrs[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def add_scaled(rows, factor, terms):
    """Return `rows + factor * terms`, of one row each or of several."""
    total = ()
    for part in tl.static_range(len(rows)):
        total += (rows[part] + factor * terms[part],)
    return total


@triton.jit
def scaled(row, factor):
    """Return `factor * row`."""
    product = ()
    for part in tl.static_range(len(row)):
        product += (factor * row[part],)
    return product


@triton.jit
def sum_over_entries(rows):
    """Return the sum of some rows."""
    total = ()
    for part in tl.static_range(len(rows)):
        total += (tl.sum(rows[part], axis=0),)
    return total


@triton.jit
def dot(row, other):
    """Return the inner product of two rows."""
    whole = row[0] * other[0]
    rest = 0.0
    for part in tl.static_range(1, len(row)):
        product = row[part] * other[part]
        if product.shape[0] == whole.shape[0]:
            whole += product
        else:
            rest += tl.sum(product, axis=0)
    return tl.sum(whole, axis=0) + rest


@triton.jit
def dots(rows, row):
    """Return the inner products of some rows with one."""
    whole = rows[0] * row[0][None, :]
    rest = tl.zeros([whole.shape[0]], tl.float32)
    for part in tl.static_range(1, len(row)):
        product = rows[part] * row[part][None, :]
        if product.shape[1] == whole.shape[1]:
            whole += product
        else:
            rest += tl.sum(product, axis=1)
    return tl.sum(whole, axis=1) + rest


@triton.jit
def pre_activation_tile(
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return `x W_enc^T + b_enc` for some rows and latents; latents past the last are -inf, rows past it repeat it."""
    x_rows = x_ptr + tl.minimum(rows, n_rows - 1).to(tl.int64)[:, None] * stride_x
    W_rows = W_ptr + tl.minimum(columns, d_sae - 1).to(tl.int64)[None, :] * stride_W
    z = tl.zeros([BLOCK_ROWS, BLOCK_LATENTS], tl.float32)
    for start in range(0, d_in, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d[None, :], mask=(d < d_in)[None, :], other=0.0)
        W = tl.load(W_rows + d[:, None], mask=(d < d_in)[:, None], other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            W = W.to(tl.float32)
        z = tl.dot(x, W, z, input_precision="ieee")
    bias = tl.load(b_ptr + columns, mask=columns < d_sae, other=float("-inf"))
    return z + bias.to(tl.float32)[None, :]


@triton.jit
def ordered_bits(value, DROPPED: tl.constexpr):
    """Return an int32 that orders as values do after ReLU; what is not a number is above every number.

    It is the bits of the value, rounded half up to `DROPPED` bits fewer, which are 0.
    """
    bits = tl.where(value <= 0, 0.0, value).to(tl.uint32, bitcast=True)
    # Without their sign's meaning, the bits of every NaN are above those of infinity.
    bits = tl.minimum(bits, 0x7FC00000)
    if DROPPED > 0:
        bits = ((bits + (1 << (DROPPED - 1))) >> DROPPED) << DROPPED
    return bits.to(tl.int32)


@triton.jit
def wide_key(bits, column):
    """Return an int64 that orders by `ordered_bits`, then by lower column."""
    return (bits.to(tl.int64) << 32) | (column ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def wide_key_column(key):
    """Return the column of a wide key."""
    return (key & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def grouped_tile(n_row_blocks, n_tiles, GROUP: tl.constexpr):
    """Return this program's (row block, tile), walking a few row blocks abreast so that they share `W_enc` in L2."""
    program = tl.program_id(0)
    group_size = GROUP * n_tiles
    first = (program // group_size) * GROUP
    width = tl.minimum(n_row_blocks - first, GROUP)
    return first + (program % group_size) % width, (program % group_size) // width
