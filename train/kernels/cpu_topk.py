"""The k largest of each row on a CPU, by maxima of groups and NumPy's vectorised partition.

`torch.topk` spends 2 to 10 ns on an entry. Here a row's entries are first compared in groups: the k groups with
the largest maxima hold k largest entries, and groups of groups are found in the same way. What is left are a few
hundred candidates a row; each becomes one integer, its value above its position, and NumPy partitions integers
with the processor's vector instructions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_WIDER = {torch.int16: (torch.int32, 16), torch.int32: (torch.int64, 32)}
_FEW = 12
_MANY = 64
_MOST_CANDIDATES = 1 << 16


def topk_of_rows(
    pre_acts: Float[Tensor, "batch d_sae"], k: int
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Return each row's k largest entries, unsorted, and their columns; which entries below zero is left open.

    Positive floats are ordered as the integers of their bits are, and the negative ones come after: that suffices
    where ReLU follows, and integers are compared ten times as fast as bfloat16.
    """
    if pre_acts.dtype not in BITS or k > _MOST_CANDIDATES // 8:
        return torch.topk(pre_acts, k, dim=1, sorted=False)
    bits = pre_acts.view(BITS[pre_acts.dtype])
    values, columns = _largest(bits, k)
    return values.view(pre_acts.dtype), columns


def n_parts(dtype: torch.dtype, d_sae: int, k: int) -> int:
    """Return the number of equal parts in which rows of `d_sae` entries are best made for `topk_of_parts`."""
    size = _group_size(d_sae, k) if dtype in BITS and k <= _MOST_CANDIDATES // 8 else 1
    return size if d_sae % size == 0 else 1


def topk_of_parts(
    parts: Sequence[Float[Tensor, "batch width"]], k: int
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Do as `topk_of_rows` on rows that are given as `n_parts` parts, one after the other.

    A group then has an entry of each part, and a part is compared while it is in the cache of the core that made it.
    """
    if len(parts) == 1:
        return topk_of_rows(parts[0], k)
    bits = [part.view(BITS[part.dtype]) for part in parts]
    maxima = bits[0].clone()
    for others in bits[1:]:
        torch.maximum(maxima, others, out=maxima)
    _, groups = _largest(maxima, k)
    width = maxima.shape[1]
    columns = (groups[:, None, :] + torch.arange(0, width * len(bits), width)[:, None]).flatten(1)
    values, places = _partition(torch.cat([part.gather(1, groups) for part in bits], 1), k)
    return values.view(parts[0].dtype), columns.gather(1, places)


def _largest(bits: Int[Tensor, "batch n"], k: int) -> tuple[Int[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    n = bits.shape[1]
    size = _group_size(n, k)
    if size == 1:
        return _partition(bits, k) if n <= _MOST_CANDIDATES else torch.topk(bits, k, dim=1, sorted=False)
    # A group is `size` entries that are `stride` apart, so that comparing them is comparing whole runs.
    stride = n // size
    whole = stride * size
    _, groups = _largest(bits[:, :whole].unflatten(1, (size, stride)).amax(1), k)
    columns = (groups[:, None, :] + torch.arange(0, whole, stride)[:, None]).flatten(1)
    if whole < n:
        columns = torch.cat([columns, torch.arange(whole, n).expand(len(columns), -1)], 1)
    values, places = _partition(bits.gather(1, columns), k)
    return values, columns.gather(1, places)


def _group_size(n: int, k: int) -> int:
    """Return how many of a row's n entries to compare at once; 1 if the row is short enough."""
    if n <= _FEW * k:
        return 1
    return 8 if n > _MANY * k and k <= _MANY else 4


def _partition(bits: Int[Tensor, "batch n"], k: int) -> tuple[Int[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    wider, shift = _WIDER[bits.dtype]
    n = bits.shape[1]
    keys = (bits.to(wider) << shift).add_(torch.arange(n, dtype=wider))
    keys.numpy().partition(n - k, axis=1)
    largest: Shaped[Tensor, "batch k"] = keys[:, n - k :]
    return (largest >> shift).to(bits.dtype), (largest & (_MOST_CANDIDATES - 1)).long()
