"""The side files with moments, held-out contexts and training-row counts: of a shard, or of a whole store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import safetensors
from safetensors import numpy as tensors

from ..errors import StoreError
from .format import Header
from .moments import Moments, merge


@dataclass(frozen=True)
class Statistics:
    """Of each hook point the moments; of each context whether it is held out; of each chunk its training rows."""

    moments: dict[str, Moments]
    held_out: np.ndarray
    training_rows: np.ndarray


def merge_statistics(parts: list[Statistics], header: Header) -> Statistics:
    """Return the statistics of a store from those of its shards, in order."""
    moments = {name: merge([part.moments[name] for part in parts], d) for name, d in header.hook_points.items()}
    held_out = np.concatenate([part.held_out for part in parts]) if parts else np.zeros(0, dtype=bool)
    training = np.concatenate([part.training_rows for part in parts]) if parts else np.zeros(0, dtype=np.int64)
    return Statistics(moments, held_out, training)


def encode_statistics(statistics: Statistics) -> bytes:
    """Return the safetensors file."""
    arrays = {"held_out": statistics.held_out.astype(np.uint8), "training_rows": statistics.training_rows}
    for name, moments in statistics.moments.items():
        arrays[f"{name}/count"] = np.array([moments.count], dtype=np.int64)
        arrays[f"{name}/mean"] = moments.mean
        arrays[f"{name}/M2"] = moments.M2
        arrays[f"{name}/sum_norm"] = np.array([moments.sum_norm])
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
    return Statistics(moments, arrays["held_out"].astype(bool), arrays["training_rows"])
