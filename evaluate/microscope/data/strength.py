"""How strongly to steer a latent to begin with: by its largest activation, and by the activations that it is added to.

Twice the largest activation in the index shows what most latents do. It fails for those that fire on a few tokens whose
activations are a thousand times as long as others: added everywhere, that drowns whatever the model had computed. So
the vector that an edit adds is never longer by default than an activation at its hook point typically is.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from ....shared.model.hook_points import canonical_hook_point
from ....shared.sae import CrossLayerTranscoder, Sae
from ...report.definitions import significant
from .latents import LatentTables
from .saes import SaeShelf

MULTIPLE = 2.0
"""Of the largest activation."""
MOST_LENGTH = 1.0
"""Of the typical length of an activation."""
MEASURED_ROWS = 4096


class UsualStrengths:
    """Strengths to begin with. Methods may be called from several threads."""

    def __init__(self, tables: LatentTables, shelf: SaeShelf):
        self._tables, self._shelf, self._store = tables, shelf, tables.run.store
        self._lock = threading.Lock()
        self._lengths: dict[str, float | None] = {}

    def of(self, name: str, latent: int) -> dict[str, Any]:
        """Return a strength of adding a latent, its unit, and what it follows from.

        `length` is how long the added vector is, as a multiple of the median norm of the store's activations at the
        hook point it is added to (the largest multiple, if it is added to several); None if the store is not here.

        Raises:
            MissingFileError: there is no such SAE, or its weights are gone.
            SaeError: it cannot be read.
        """
        largest = float(self._tables.maxima(name)[latent])
        per_unit = self._length_of_one(self._shelf.get(name), latent)
        strength, unit = MULTIPLE, "max"
        if per_unit and (largest <= 0 or MULTIPLE * largest * per_unit > MOST_LENGTH):
            strength, unit = float(f"{MOST_LENGTH / per_unit:.2g}"), "activation"
        amount = strength * (largest if unit == "max" else 1.0)
        return {
            "strength": strength,
            "unit": unit,
            "max_activation": significant(largest),
            "length": None if per_unit is None else significant(amount * per_unit),
        }

    def _length_of_one(self, sae: Sae, latent: int) -> float | None:
        """Return how long a latent's decoder row is, in typical lengths of what it is added to."""
        lengths = [(self._typical_length(place), norm) for place, norm in _rows_of(sae, latent)]
        known = [norm / typical for typical, norm in lengths if typical]
        return max(known) if known else None

    def _typical_length(self, hook_point: str) -> float | None:
        """Return the median norm of the first rows of the store that SAEs read."""
        if self._store is None:
            return None
        with self._lock:
            if hook_point not in self._lengths:
                stored = {canonical_hook_point(name): name for name in self._store.hook_points}
                self._lengths[hook_point] = self._measure(stored[hook_point]) if hook_point in stored else None
            return self._lengths[hook_point]

    def _measure(self, hook_point: str) -> float | None:
        assert self._store is not None
        n = min(MEASURED_ROWS, self._store.n_rows)
        usable = torch.from_numpy(self._store.row_mask(0, n, any_role=True))
        rows = self._store.read(hook_point, 0, n)[usable].float()
        return float(rows.norm(dim=1).median()) if len(rows) else None


def _rows_of(sae: Sae, latent: int) -> list[tuple[str, float]]:
    """Return the hook points that a latent writes to, and the norm of its decoder row at each."""
    writes = [canonical_hook_point(name) for name in sae.writes]
    if isinstance(sae, CrossLayerTranscoder):
        layer, row = divmod(latent, sae.sizes.d_sae)
        norms = sae.get_parameter(f"W_dec_{layer}")[row].float().norm(dim=1)
        writes = writes[layer:]
    else:
        norms = sae.W_dec[latent].float().view(len(writes), -1).norm(dim=1)
    return list(zip(writes, norms.tolist(), strict=True))
