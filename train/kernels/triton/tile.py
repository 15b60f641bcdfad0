"""Parts that the Triton kernels share: one tile of pre-activations, and keys that sort like values.

Hints for other readers: `tl.dot` accumulates in float32; row starts are 64-bit, because d_sae * d_in
passes 2^31 long before memory runs out; a masked load always names the value that changes nothing.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import os

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
