"""Input normalisation: rows are centred on the store's exact mean, then scaled to a mean norm of sqrt(d_in).

In training, rows that are very far from the mean are shortened. Language models give a few tokens massive activations
(arXiv 2402.17762): 30 of 188,380 rows of SmolLM2's residual stream hold 56% of its variance, and the loss would be
that of these rows. Then rows may be rotated (see `rotation.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ...shared.core.errors import NonFiniteError, StoreError
from .rotation import Rotation
from .sample import centred_rows

if TYPE_CHECKING:
    from ...shared.store import ActivationStore
    from ..config import SaeConfig

_SAMPLE_ROWS = 1 << 17


class RowScale(msgspec.Struct, frozen=True, kw_only=True):
    """How a run scales the rows of a hook point.

    `factor` multiplies centred rows. Centred rows longer than `max_norm`, in raw units, are shortened to it (None: none
    is). `variance` is what is left then, summed over channels (None: the store's).
    """

    factor: float
    max_norm: float | None = None
    variance: float | None = None


@dataclass(frozen=True)
class Normalization:
    """`x -> (x - mean) * scale`, then shortened to a norm of at most `max_norm`, then rotated.

    `total_variance` is the variance of the target, summed over channels. A transcoder's target has its own
    normalisation. Saved SAEs have `mean`, `scale` and `rotation` folded in, and take rows of any length.
    """

    mean: Float[Tensor, " d_in"]
    scale: float | Float[Tensor, " d_in"]
    total_variance: float
    target: Normalization | None = None
    max_norm: float = math.inf
    rotation: Rotation | None = None

    def to(self, device: torch.device | str) -> Normalization:
        """Return this normalisation with its tensors on a device."""
        scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        target = self.target.to(device) if self.target else None
        rotation = self.rotation.to(device) if self.rotation else None
        return replace(self, mean=self.mean.to(device), scale=scale, target=target, rotation=rotation)

    def identity(self) -> Normalization:
        """Return the identity normalisation of the same widths."""
        target = self.target.identity() if self.target else None
        return Normalization(torch.zeros_like(self.mean), 1.0, 1.0, target)


def normalization_of(store: ActivationStore, hook_point: str, scale: RowScale) -> Normalization:
    """Return a hook point's normalisation with a scale, such as the one with which a run began."""
    moments = store.moments(hook_point)
    mean = torch.as_tensor(moments.mean).to(torch.float32)
    variance = float(moments.total_variance) if scale.variance is None else scale.variance
    max_norm = math.inf if scale.max_norm is None else scale.max_norm * scale.factor
    return Normalization(mean, scale.factor, variance * scale.factor**2, max_norm=max_norm)


def row_scale(store: ActivationStore, hook_point: str, kind: str, max_row_norm: float) -> RowScale:
    """Return how `normalize_activations = kind` and `max_row_norm` scale a hook point's rows.

    `max_row_norm` is in multiples of the rows' median distance from their mean; 0 keeps all rows. With
    `expected_average_only_in`, centred rows have a mean norm of sqrt(d_in). The factor is computed from *centred* rows:
    in real models, a large mean or a channel with a large offset can be much larger than the variation, and a factor
    computed from raw rows would shrink the variation until a sparsity penalty outweighs it.

    Raises:
        StoreError: the rows do not vary.
        NonFiniteError: their norms overflow float32.
    """
    if kind == "none" and not max_row_norm:
        return RowScale(factor=1.0)
    norms = centred_norms(store, hook_point)
    where = f"the activations at '{hook_point}' in store '{store.path}'"
    mean_norm = float(norms.mean())
    if not mean_norm > 0:
        raise StoreError(f"{where} do not vary in float32; harvest again")
    if not math.isfinite(mean_norm):
        raise NonFiniteError(f"{where} are so large that their norms overflow float32; scale them down and store again")
    max_norm = max_row_norm * float(np.median(norms)) or None
    variance = None
    if max_norm is not None and norms.max() > max_norm:
        shorter = np.minimum(norms, max_norm)
        mean_norm = float(shorter.mean())
        variance = float(np.square(shorter).mean())
    factor = store.d_in(hook_point) ** 0.5 / mean_norm if kind == "expected_average_only_in" else 1.0
    return RowScale(factor=factor, max_norm=max_norm, variance=variance)


def shortening_notes(store: ActivationStore, row_scales: Mapping[str, RowScale]) -> list[str]:
    """Return a line for the user per hook point with rows that are shortened."""
    notes = []
    for hook_point, scale in row_scales.items():
        if scale.variance is not None:
            taken = 1 - scale.variance / float(store.moments(hook_point).total_variance)
            notes.append(
                f"a few rows at '{hook_point}' have massive activations, which hold {taken:.0%} of the variance; "
                "training shortens them, or their errors (max_row_norm)"
            )
    return notes


def scale_of_raw_norm(store: ActivationStore, hook_point: str, kind: str) -> float:
    """Return the scale that earlier releases computed, from the mean norm of rows that were not centred."""
    scales = kind == "expected_average_only_in"
    return store.d_in(hook_point) ** 0.5 / store.moments(hook_point).mean_norm if scales else 1.0


def centred_norms(store: ActivationStore, hook_point: str) -> Float64[np.ndarray, " rows"]:
    """Return `||x - mean||` of about 131,072 training rows, or of all if there are no more."""
    norms = [torch.linalg.vector_norm(rows, dim=1) for rows in centred_rows(store, hook_point, _SAMPLE_ROWS)]
    return torch.cat(norms).numpy().astype(np.float64)


def normalization_across(sae: SaeConfig, by_hook: Mapping[str, Normalization]) -> Normalization:
    """Return the normalisation of an SAE's input, and of its target if that differs."""
    source = _side_by_side([by_hook[name] for name in sae.wiring.reads])
    if sae.wiring.writes == sae.wiring.reads:
        return source
    target = _side_by_side([by_hook[name] for name in sae.wiring.writes])
    return replace(source, total_variance=target.total_variance, target=target)


def _side_by_side(parts: Sequence[Normalization]) -> Normalization:
    if len(parts) == 1:
        return parts[0]
    scale = torch.cat([torch.full_like(part.mean, float(part.scale)) for part in parts])
    max_norm = math.sqrt(sum(part.max_norm**2 for part in parts))
    variance = sum(part.total_variance for part in parts)
    turns = [part.rotation for part in parts if part.rotation is not None]
    rotation = Rotation(tuple(V for turn in turns for V in turn.axes)) if turns else None
    mean = torch.cat([part.mean for part in parts])
    return Normalization(mean, scale, variance, max_norm=max_norm, rotation=rotation)
