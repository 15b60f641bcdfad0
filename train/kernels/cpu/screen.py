"""The k largest pre-activations of each row on a CPU: screened by an int8 product, chosen in full precision.

An int8 product takes half the time of a bfloat16 one. Its error has a known bound, so every pre-activation has an
upper and a lower bound, and only entries whose upper bound is at least the k-th largest lower bound can be among the k
largest. These candidates, about 1.5 k, are computed in full precision, and the k largest of them are returned. This
also decides near ties correctly, which bfloat16 pre-activations decide by chance.

The bounds are three standard deviations. A true top-k entry is lost only if its error and a competitor's differ by six
standard deviations plus the gap between the values: about one near tie in 100,000.
"""

from __future__ import annotations

from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8, Int16, Int64
from torch import Tensor

from ....shared.core.compute.cores import by_blocks, even_blocks, joined, on_cores
from .csc import csc_of
from .dots import dot_products
from .int8 import LEVELS, Int8Encoder, multiplies_int8, peaks_and_norms, peaks_of
from .topk import n_parts, topk_of_rows

LEAST_WEIGHTS = 1 << 22
_MOST_K = 256
_LEAST_ROWS, _MOST_ROWS, _BLOCK_ENTRIES = 64, 256, 1 << 22
_ENTRIES = 1 << 14
_GROUPS_PER_K = 6
_MOST_HITS_PER_K = 4
_MOST_CROWDED = 1 / 16


class _Found(NamedTuple):
    """Entries by row: the rows, the number of entries in each, their latents, and rows with too many to list."""

    rows: Int64[Tensor, " rows"]
    counts: Int64[Tensor, " rows"]
    latents: Int64[Tensor, " n"]
    crowded: Int64[Tensor, " n_crowded"]


def screened_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]] | None:
    """Return the k largest of each row of `W_enc (x - b_dec) + b_enc`, unsorted, and their latents.

    Entries that are not positive may be replaced by zeros of arbitrary latents, with repetitions. Returns None if a
    bfloat16 product is better: if the CPU lacks the instructions, for small weights or large k, if in many rows too
    many entries are close to the k-th largest, and for numbers that are not finite.
    """
    parts = n_parts(torch.bfloat16, len(W_enc), k)
    if parts == 1 or k > _MOST_K or W_enc.numel() < LEAST_WEIGHTS or not multiplies_int8():
        return None
    if x.dtype is not torch.float32 or not len(x):
        return None
    centred = torch.empty_like(x)
    by_column = by_blocks(lambda rows: peaks_of(torch.sub(x[rows], b_dec, out=centred[rows]).T), len(x))
    # A row has a single step, so columns with large entries are scaled down and the matching weights scaled up.
    columns = torch.stack(by_column).amax(0).sqrt_()
    encoder = Int8Encoder.of(W_enc, columns)
    peaks, norms = joined(by_blocks(lambda rows: peaks_and_norms(centred[rows] / columns), len(x)))
    if not bool(torch.isfinite(peaks.sum() + encoder.norms.sum() + b_enc.sum())):
        return None
    order = peaks.argsort()
    most_rows = max(_LEAST_ROWS, min(_MOST_ROWS, _BLOCK_ENTRIES // len(W_enc)))
    spare: SimpleQueue[Tensor] = SimpleQueue()

    def search(block: slice) -> _Found:
        rows = order[block]
        step = peaks[rows[-1]] / LEVELS
        inputs = encoder.inputs(centred.index_select(0, rows).div_(columns * step))
        scale, offset, error = encoder.scales(step, norms[rows].amax())
        try:
            upper = spare.get_nowait()
        except Empty:
            upper = torch.empty(parts, most_rows, len(W_enc) // parts, dtype=torch.int16)
        maxima = _upper_bounds(upper[:, : len(rows)], inputs, encoder.q, scale, offset.add_(b_enc).add_(error))
        found = _reaching(upper, maxima, _floor(maxima, k, 2 * error), rows, k)
        spare.put(upper)
        return found

    found = _Found(*joined(on_cores(search, even_blocks(len(x), most_rows))))
    if not len(found.latents) or len(found.crowded) > _MOST_CROWDED * len(x):
        return None
    values, latents = _choose(found, centred, W_enc, b_enc, k)

    def compute_whole(part: slice) -> None:
        rows = found.crowded[part]
        pre_acts = torch.addmm(b_enc, centred.index_select(0, rows), W_enc.T)
        values[rows], latents[rows] = torch.topk(pre_acts, k, dim=1, sorted=False)

    if len(found.crowded):
        by_blocks(compute_whole, len(found.crowded), _LEAST_ROWS)
    return values, latents


def _upper_bounds(
    out: Int16[Tensor, "parts n width"],
    x: Int8[Tensor, "n width_in"],
    W: Int8[Tensor, "d_sae width_in"],
    scale: Float[Tensor, " d_sae"],
    offset: Float[Tensor, " d_sae"],
) -> Int16[Tensor, "n width"]:
    """Write the bits of `x W^T scale + offset` in bfloat16, part by part, and return the maxima of the parts.

    In bfloat16, half as much memory needs to stay in cache, and comparing bits as integers is fast. The order of
    negative numbers is undefined.
    """
    maxima = torch.empty(0)
    sums = torch.empty(out.shape[1:], dtype=torch.int32)
    bounds = sums.view(torch.float32)
    for bits, part in zip(out, even_blocks(len(W), len(W) // len(out)), strict=True):
        torch._int_mm(x, W[part].T, out=sums)  # pyright: ignore[reportPrivateImportUsage]
        torch.addcmul(offset[part], bounds.copy_(sums), scale[part], out=bounds)
        bits.view(torch.bfloat16).copy_(bounds)
        maxima = torch.maximum(maxima, bits, out=maxima) if len(maxima) else bits.clone()
    return maxima


def _floor(maxima: Int16[Tensor, "n width"], k: int, errors: Float[Tensor, " d_sae"]) -> Int16[Tensor, " n"]:
    """Return a floor, as bits, that the upper bounds of each row's k largest entries reach; 0 if it is not positive.

    The floor is the k-th largest lower bound of the groups' maxima. A lower bound is the upper bound minus the largest
    error in the group and the error of rounding to bfloat16.
    """
    size = max(1, maxima.shape[1] // (_GROUPS_PER_K * k))
    width = maxima.shape[1] // size
    groups = maxima[:, : size * width].unflatten(1, (size, width)).amax(1).view(torch.bfloat16)
    errors = errors.view(-1, maxima.shape[1])[:, : size * width].reshape(-1, width).amax(0)
    lower = torch.addcmul(-errors, groups.float(), torch.tensor(1 - 2**-8))
    lower.numpy().partition(width - k, axis=1)
    return lower[:, width - k].clamp_min(0.0).bfloat16().view(torch.int16)


def _reaching(
    upper: Int16[Tensor, "parts rows width"],
    maxima: Int16[Tensor, "n width"],
    least: Int16[Tensor, " n"],
    ids: Int64[Tensor, " n"],
    k: int,
) -> _Found:
    """Return the entries that reach their row's floor; a row in which too many groups reach it is crowded."""
    n_rows, width = maxima.shape
    groups = _places(maxima >= least[:, None])
    counts = torch.searchsorted(groups, torch.arange(0, maxima.numel() + 1, width)).diff()
    crowded = counts > _MOST_HITS_PER_K * k
    if bool(crowded.any()):
        groups = groups[~torch.repeat_interleave(crowded, counts)]
        counts.masked_fill_(crowded, 0)
    rows, leasts = torch.repeat_interleave(counts), torch.repeat_interleave(least, counts)
    hits = _places(torch.stack([part.view(-1).index_select(0, groups) >= leasts for part in upper], 1))
    which = hits // len(upper)
    latents = (groups - rows * width).index_select(0, which).add_(hits % len(upper), alpha=width)
    counts = torch.bincount(rows.index_select(0, which), minlength=n_rows)
    return _Found(ids, counts, latents, ids[crowded])


def _places(mask: Bool[Tensor, "*shape"]) -> Int64[Tensor, " n"]:
    """Return the flat indices where a mask is true; NumPy takes a third of PyTorch's time."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _choose(
    found: _Found, x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_sae d_in"], b_enc: Tensor, k: int
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Return the k largest of the entries found in each row by their pre-activations in full precision.

    A row with fewer entries is filled with pre-activations of zero, of arbitrary latents.
    """
    csc = csc_of(found.latents, torch.repeat_interleave(found.rows, found.counts), len(W_enc))
    products = dot_products(W_enc, x, csc.offsets, csc.rows)
    first = torch.empty_like(found.rows).scatter_(0, found.rows, found.counts.cumsum(0) - found.counts)
    width = max(k, int(found.counts.amax()))
    pre_acts = x.new_zeros(len(x), width)

    def place(part: slice) -> None:
        order, rows = csc.order[part], csc.rows[part]
        by_latent = products[part] + b_enc.index_select(0, found.latents.index_select(0, order))
        places = torch.add(order, rows, alpha=width).sub_(first.index_select(0, rows))
        pre_acts.view(-1).scatter_(0, places, by_latent)

    by_blocks(place, len(products), _ENTRIES)
    values, latents = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)

    def choose(rows: slice) -> None:
        values[rows], places = topk_of_rows(pre_acts[rows], k)
        places = places.add_(first[rows, None]).clamp_max_(len(found.latents) - 1)
        latents[rows] = found.latents.index_select(0, places.view(-1)).view(places.shape)

    by_blocks(choose, len(x))
    return values, latents
