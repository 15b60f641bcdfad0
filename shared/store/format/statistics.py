"""The statistics files: moments, held-out contexts and training-row counts of a shard or of a whole store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import safetensors
from safetensors import numpy as tensors

from ...core.errors import StoreError
from .layout import Header
from .moments import Moments
from .roles import N_ROLES


@dataclass(frozen=True)
class Statistics:
    """The moments of each hook point's training rows, and which contexts are held out.

    `held_out` is bool [contexts], `training_rows` int64 [chunks]. In a store with roles, `by_role` has the moments of
    each role's training rows in the order of `ROLE_NAMES`, and `role_rows` (int64 [chunks, roles]) counts them.
    """

    moments: dict[str, Moments]
    held_out: np.ndarray
    training_rows: np.ndarray
    by_role: dict[str, tuple[Moments, ...]] = field(default_factory=dict)
    role_rows: np.ndarray | None = None


def moments_of_roles(header: Header, d_in: int) -> tuple[Moments, ...]:
    """Return the moments of no rows for each role, or an empty tuple if the store has no roles."""
    return (Moments.none(d_in),) * N_ROLES if header.has_roles else ()


def add_by_role(first: tuple[Moments, ...], other: tuple[Moments, ...]) -> tuple[Moments, ...]:
    """Merge the moments of each role."""
    return tuple(mine + theirs for mine, theirs in zip(first, other, strict=True))


def merge_statistics(parts: Iterable[Statistics], header: Header) -> Statistics:
    """Return the statistics of a store, merged in order from those of its shards, one in memory at a time."""
    moments = {name: Moments.none(d_in) for name, d_in in header.hook_points.items()}
    by_role = {name: moments_of_roles(header, d_in) for name, d_in in header.hook_points.items()}
    held_out, training = [np.zeros(0, dtype=bool)], [np.zeros(0, dtype=np.int64)]
    role_rows = [np.zeros((0, N_ROLES), dtype=np.int64)]
    for part in parts:
        moments = {name: moments[name] + part.moments[name] for name in moments}
        held_out.append(part.held_out)
        training.append(part.training_rows)
        if part.role_rows is not None:
            by_role = {name: add_by_role(by_role[name], part.by_role[name]) for name in by_role}
            role_rows.append(part.role_rows)
    whole = (moments, np.concatenate(held_out), np.concatenate(training))
    return Statistics(*whole, by_role, np.concatenate(role_rows)) if header.has_roles else Statistics(*whole)


def encode_statistics(statistics: Statistics) -> bytes:
    """Return the safetensors file."""
    arrays = {"held_out": statistics.held_out.astype(np.uint8), "training_rows": statistics.training_rows}
    for name, moments in statistics.moments.items():
        arrays[f"{name}/count"] = np.array([moments.count], dtype=np.int64)
        arrays[f"{name}/mean"] = moments.mean
        arrays[f"{name}/M2"] = moments.M2
        arrays[f"{name}/sum_norm"] = np.array([moments.sum_norm])
    for name, parts in statistics.by_role.items():
        arrays[f"{name}/roles/count"] = np.array([part.count for part in parts], dtype=np.int64)
        arrays[f"{name}/roles/mean"] = np.stack([part.mean for part in parts])
        arrays[f"{name}/roles/M2"] = np.stack([part.M2 for part in parts])
        arrays[f"{name}/roles/sum_norm"] = np.array([part.sum_norm for part in parts])
    if statistics.role_rows is not None:
        arrays["role_training_rows"] = statistics.role_rows
    return tensors.save(arrays)


def decode_statistics(content: bytes, header: Header, n_contexts: int) -> Statistics:
    """Return the statistics of `n_contexts` contexts; raise `StoreError` if the file does not have their arrays."""
    try:
        arrays = tensors.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"not a safetensors file: {error}") from None
    n_chunks = -(-n_contexts * header.context_size // header.chunk_rows)
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "held_out": ((n_contexts,), np.uint8),
        "training_rows": ((n_chunks,), np.int64),
    }
    for name, d_in in header.hook_points.items():
        shapes |= {f"{name}/count": ((1,), np.int64), f"{name}/sum_norm": ((1,), np.float64)}
        shapes |= {f"{name}/mean": ((d_in,), np.float64), f"{name}/M2": ((d_in,), np.float64)}
        if header.covariance:  # the arrays are ignored
            shapes[f"{name}/C"] = ((d_in, d_in), np.float64)
        if header.has_roles:
            shapes |= {f"{name}/roles/count": ((N_ROLES,), np.int64)}
            shapes |= {f"{name}/roles/sum_norm": ((N_ROLES,), np.float64)}
            shapes |= {f"{name}/roles/{part}": ((N_ROLES, d_in), np.float64) for part in ("mean", "M2")}
    if header.has_roles:
        shapes["role_training_rows"] = ((n_chunks, N_ROLES), np.int64)
    if {key: (array.shape, array.dtype.type) for key, array in arrays.items()} != shapes:
        raise StoreError("its arrays are not those of the header's hook points")
    moments = {
        name: Moments(
            int(arrays[f"{name}/count"][0]),
            arrays[f"{name}/mean"],
            arrays[f"{name}/M2"],
            float(arrays[f"{name}/sum_norm"][0]),
        )
        for name in header.hook_points
    }
    by_role = {name: _by_role(arrays, name) for name in header.hook_points if header.has_roles}
    training_rows, role_rows = arrays["training_rows"], arrays.get("role_training_rows")
    return Statistics(moments, arrays["held_out"].astype(bool), training_rows, by_role, role_rows)


def _by_role(arrays: Mapping[str, np.ndarray], name: str) -> tuple[Moments, ...]:
    counts, means, M2s, sums = (arrays[f"{name}/roles/{part}"] for part in ("count", "mean", "M2", "sum_norm"))
    return tuple(Moments(int(counts[i]), means[i], M2s[i], float(sums[i])) for i in range(N_ROLES))
