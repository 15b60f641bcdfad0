"""The side files with moments, held-out contexts and training-row counts: of a shard, or of a whole store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import safetensors
from safetensors import numpy as tensors

from ..errors import StoreError
from .covariance import merge_co_moments
from .format import Header
from .moments import Moments


@dataclass(frozen=True)
class Statistics:
    """Of each hook point the moments; of each context whether it is held out; of each chunk its training rows.

    Where the store keeps covariances, of each hook point also the co-moment: `C` sums products of deviations from the
    mean.
    """

    moments: dict[str, Moments]
    held_out: np.ndarray
    training_rows: np.ndarray
    co_moments: dict[str, np.ndarray] = field(default_factory=dict)


def merge_statistics(parts: Iterable[Statistics], header: Header) -> Statistics:
    """Return the statistics of a store from those of its shards, in order, holding one of them at a time."""
    moments = {name: Moments.none(d_in) for name, d_in in header.hook_points.items()}
    co_moments: dict[str, np.ndarray] = {}
    held_out, training = [np.zeros(0, dtype=bool)], [np.zeros(0, dtype=np.int64)]
    for part in parts:
        for name, co_moment in part.co_moments.items():
            before = co_moments.get(name, co_moment)
            co_moments[name] = merge_co_moments(before, moments[name], co_moment, part.moments[name])
        moments = {name: moments[name] + part.moments[name] for name in moments}
        held_out.append(part.held_out)
        training.append(part.training_rows)
    return Statistics(moments, np.concatenate(held_out), np.concatenate(training), co_moments)


def encode_statistics(statistics: Statistics) -> bytes:
    """Return the safetensors file."""
    arrays = {"held_out": statistics.held_out.astype(np.uint8), "training_rows": statistics.training_rows}
    for name, moments in statistics.moments.items():
        arrays[f"{name}/count"] = np.array([moments.count], dtype=np.int64)
        arrays[f"{name}/mean"] = moments.mean
        arrays[f"{name}/M2"] = moments.M2
        arrays[f"{name}/sum_norm"] = np.array([moments.sum_norm])
    for name, co_moment in statistics.co_moments.items():
        arrays[f"{name}/C"] = co_moment
    return tensors.save(arrays)


def decode_statistics(content: bytes, header: Header, n_contexts: int) -> Statistics:
    """Return what a file of statistics says of `n_contexts` contexts."""
    try:
        arrays = tensors.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"no statistics: {error}") from None
    n_chunks = -(-n_contexts * header.context_size // header.chunk_rows)
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "held_out": ((n_contexts,), np.uint8),
        "training_rows": ((n_chunks,), np.int64),
    }
    for name, d_in in header.hook_points.items():
        shapes |= {f"{name}/count": ((1,), np.int64), f"{name}/sum_norm": ((1,), np.float64)}
        shapes |= {f"{name}/mean": ((d_in,), np.float64), f"{name}/M2": ((d_in,), np.float64)}
        if header.covariance:
            shapes[f"{name}/C"] = ((d_in, d_in), np.float64)
    if {key: (array.shape, array.dtype.type) for key, array in arrays.items()} != shapes:
        raise StoreError("its statistics are not of the arrays that its header names")
    moments = {
        name: Moments(
            int(arrays[f"{name}/count"][0]),
            arrays[f"{name}/mean"],
            arrays[f"{name}/M2"],
            float(arrays[f"{name}/sum_norm"][0]),
        )
        for name in header.hook_points
    }
    co_moments = {name: arrays[f"{name}/C"] for name in header.hook_points if header.covariance}
    return Statistics(moments, arrays["held_out"].astype(bool), arrays["training_rows"], co_moments)
