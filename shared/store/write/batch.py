"""A batch that a caller appends: converted to the stored bits, and checked before any of it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from ..format.bits import check_finite, to_bits
from ..format.layout import MAX_ROWS, Header
from ..format.roles import N_ROLES, PLACED


class ActivationBatch:
    """Some contexts of activations, tokens, roles and provenance, after all checks."""

    def __init__(self, n: int, rows: dict[str, np.ndarray]) -> None:
        self.n = n
        self.rows = rows
        self.lasting = False
        """Whether the caller will never change the rows, so that they need not be copied."""
        self.tokens: np.ndarray | None = None
        self.roles: np.ndarray | None = None
        self.held_out = np.zeros(n, dtype=bool)
        self.usable = np.ones(0, dtype=bool)
        self.documents = np.zeros((0, 0), dtype=np.int64)
        self.positions = np.zeros((0, 0), dtype=np.int64)

    @classmethod
    def of(
        cls,
        header: Header,
        first_context: int,
        activations: Mapping[str, Any],
        tokens: Any,
        held_out: Any,
        documents: Any,
        positions: Any,
        roles: Any,
    ) -> ActivationBatch:
        names = list(header.hook_points)
        if set(activations) != set(names):
            raise ConfigError(f"expected activations of {', '.join(names)}; got {', '.join(map(str, activations))}")
        n = len(next(iter(activations.values())))
        rows = {}
        for name, d_in in header.hook_points.items():
            expected, got = (n, header.context_size, d_in), tuple(activations[name].shape)
            if got != expected:
                raise ConfigError(f"hook point '{name}': expected activations of shape {expected}, got {got}")
            rows[name] = to_bits(activations[name], header.dtype, name)
            if n:
                check_finite(rows[name], header.dtype, name, first_context)
        batch = cls(n, rows)
        grid = (n, header.context_size)
        batch.usable = np.ones(grid, dtype=bool)
        if tokens is None and header.mask_token_ids:
            raise ConfigError(
                f"the store masks the token ids {header.mask_token_ids}, but a batch has no tokens to find them by; "
                "append the tokens, or leave out mask_token_ids"
            )
        if tokens is not None:
            batch.tokens = _integers("tokens", tokens, grid, np.int32)
            if header.mask_token_ids:
                batch.usable = ~np.isin(batch.tokens, header.mask_token_ids)
        if (roles is not None) != header.has_roles:
            expected, got = ("roles", "none") if header.has_roles else ("no roles", "roles")
            raise ConfigError(f"the writer was made for a store with {expected}; got a batch with {got}")
        if roles is not None:
            batch.roles = _integers("roles", roles, grid, np.int8)
            if batch.roles.size and not 0 <= int(batch.roles.min()) <= int(batch.roles.max()) < N_ROLES:
                raise ConfigError(
                    f"expected roles of 0 to {N_ROLES - 1}, got {batch.roles.min()} to {batch.roles.max()}"
                )
            batch.usable &= batch.roles != PLACED
        if held_out is not None:
            batch.held_out = _integers("held_out", held_out, (n,), np.bool_)
        unknown = np.broadcast_to(np.int64(-1), grid)
        batch.documents = unknown if documents is None else _integers("documents", documents, grid, np.int64)
        batch.positions = unknown if positions is None else _integers("positions", positions, grid, np.int64)
        return batch


def _integers(what: str, values: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if array.shape != shape or array.dtype.kind not in "iub":
        raise ConfigError(f"expected {what} of integers of shape {shape}, got {array.dtype} of shape {array.shape}")
    if dtype == np.bool_ and not np.isin(array, (0, 1)).all():
        raise ConfigError(f"expected {what} of true and false, one for each context, got {array.tolist()[:8]}")
    if dtype != np.bool_ and array.size:
        least, most = max(-(MAX_ROWS << 14), np.iinfo(dtype).min), np.iinfo(dtype).max
        if not least <= int(array.min()) <= int(array.max()) <= most:
            raise ConfigError(f"expected {what} that fit {np.dtype(dtype)}, got {array.min()} to {array.max()}")
    return array.astype(dtype)
