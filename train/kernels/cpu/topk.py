"""The k largest entries of each row on a CPU, by maxima of groups and NumPy's vectorised partition.

`torch.topk` takes 2 to 10 ns per entry. Here a row's entries are first compared in groups: the k groups with the
largest maxima contain k largest entries, and the same is done with groups of groups. This leaves a few hundred
candidates per row. Each is packed into an integer, with its value above its position, and NumPy partitions integers
with vector instructions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor

INTEGER_DTYPE = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_FEW = 12
_MANY = 64
_MOST_CANDIDATES = 1 << 16


def topk_of_rows(
    pre_acts: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Return each row's k largest entries, unsorted, and their columns; entries below zero are arbitrary.

    Positive floats are ordered like their bits as integers, and negative ones come after them. This is enough if ReLU
    follows, and integers are compared ten times as fast as bfloat16.
    """
    if pre_acts.dtype not in INTEGER_DTYPE or k > _MOST_CANDIDATES // 8:
        return torch.topk(pre_acts, k, dim=1, sorted=False)
    bits = pre_acts.view(INTEGER_DTYPE[pre_acts.dtype])
    values, columns = _largest(bits, k)
    return values.view(pre_acts.dtype), columns


def n_parts(dtype: torch.dtype, d_sae: int, k: int) -> int:
    """Return the best number of equal parts for `topk_of_parts`, for rows of `d_sae` entries."""
    size = _group_size(d_sae, k) if dtype in INTEGER_DTYPE and k <= _MOST_CANDIDATES // 8 else 1
    return size if d_sae % size == 0 else 1


def topk_of_parts(
    parts: Sequence[Float[Tensor, "batch width"]], k: int
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Do the same as `topk_of_rows` for rows that are given as `n_parts` consecutive parts.

    Each group has one entry from each part, so that comparing groups means comparing whole parts.
    """
    if len(parts) == 1:
        return topk_of_rows(parts[0], k)
    bits = [part.view(INTEGER_DTYPE[part.dtype]) for part in parts]
    maxima = bits[0].clone()
    for others in bits[1:]:
        torch.maximum(maxima, others, out=maxima)
    _, groups = _largest(maxima, k)
    values, columns = _largest_of_groups(bits, groups, maxima[:, :0])
    return values.view(parts[0].dtype), columns


def _largest(bits: Int[Tensor, "batch n"], k: int) -> tuple[Int[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    n = bits.shape[1]
    size = _group_size(n, k)
    if size == 1:
        return _partition(bits, k) if n <= _MOST_CANDIDATES else torch.topk(bits, k, dim=1, sorted=False)
    # A group consists of `size` entries that are `stride` apart, so that groups are compared as whole runs.
    stride = n // size
    whole = stride * size
    runs = bits[:, :whole].unflatten(1, (size, stride))
    _, groups = _largest(runs.amax(1), k)
    return _largest_of_groups(runs.unbind(1), groups, bits[:, whole:])


def _largest_of_groups(
    runs: Sequence[Int[Tensor, "batch stride"]], groups: Int64[Tensor, "batch k"], rest: Int[Tensor, "batch n_rest"]
) -> tuple[Int[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Return the k largest among the entries of k groups, which are at the same index of each run, and of the rest."""
    k, stride = groups.shape[1], runs[0].shape[1]
    values, places = _partition(torch.cat([*(run.gather(1, groups) for run in runs), rest], 1), k)
    which = places // k
    columns = groups.gather(1, places - which * k).add_(which, alpha=stride)
    if rest.shape[1]:
        in_rest = places - len(runs) * k
        columns = torch.where(in_rest < 0, columns, in_rest + len(runs) * stride)
    return values, columns


def _group_size(n: int, k: int) -> int:
    """Return the group size for rows of n entries; 1 if the row is short enough."""
    if n <= _FEW * k:
        return 1
    return 8 if n >= _MANY * k and k <= _MANY else 4


def _partition(bits: Int[Tensor, "batch n"], k: int) -> tuple[Int[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    n = bits.shape[1]
    keys = _above_places(bits)
    keys.numpy().partition(n - k, axis=1)
    largest: Shaped[Tensor, "batch k"] = keys[:, n - k :].contiguous()
    shift = 8 * bits.itemsize
    return (largest >> shift).to(bits.dtype), (largest & (_MOST_CANDIDATES - 1)).long()


def _above_places(bits: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
    """Return integers of twice the width: the given ones in the upper half, their column in the lower half."""
    n = bits.shape[1]
    if bits.dtype is torch.int16:  # to widen bfloat16 is to put zeros behind it, whatever the bits are
        return bits.view(torch.bfloat16).float().view(torch.int32).add_(torch.arange(n, dtype=torch.int32))
    return (bits.long() << 32).add_(torch.arange(n))
