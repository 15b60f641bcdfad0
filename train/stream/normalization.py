"""Input normalisation: rows are centred on the store's exact mean, then scaled to a mean norm of sqrt(d_in)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.core.errors import NonFiniteError, StoreError
from .row_mask import TrainingRowMask

if TYPE_CHECKING:
    from ...shared.store import ActivationStore
    from ..config import SaeConfig

_SAMPLE_ROWS = 1 << 17
_CHUNKS_AT_ONCE = 32


@dataclass(frozen=True)
class Normalization:
    """`x -> (x - mean) * scale`; `total_variance` is the variance of the target, summed over channels.

    A transcoder's target has its own normalisation.
    """

    mean: Float[Tensor, " d_in"]
    scale: float | Float[Tensor, " d_in"]
    total_variance: float
    target: Normalization | None = None

    def to(self, device: torch.device | str) -> Normalization:
        """Return this normalisation with its mean on a device."""
        scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        target = self.target.to(device) if self.target else None
        return replace(self, mean=self.mean.to(device), scale=scale, target=target)

    def identity(self) -> Normalization:
        """Return the identity normalisation of the same widths."""
        target = self.target.identity() if self.target else None
        return Normalization(torch.zeros_like(self.mean), 1.0, 1.0, target)

    def apply(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return the batch in float32, centred and scaled."""
        return x.to(torch.float32).sub(self.mean.to(x.device)).mul_(self.scale)


def normalization_of(store: ActivationStore, hook_point: str, kind: str) -> Normalization:
    """Return a hook point's normalisation.

    With `expected_average_only_in`, centred rows have a mean norm of sqrt(d_in). The scale is computed from *centred*
    rows: in real models, a large mean or a channel with a large offset can be much larger than the variation, and a
    scale computed from raw rows would shrink the variation until a sparsity penalty outweighs it.
    """
    return normalization_at(store, hook_point, scale_of(store, hook_point, kind))


def normalization_at(store: ActivationStore, hook_point: str, scale: float) -> Normalization:
    """Return a hook point's normalisation with a given scale, such as the scale with which a run began."""
    moments = store.moments(hook_point)
    mean = torch.as_tensor(moments.mean).to(torch.float32)
    return Normalization(mean, scale, float(moments.total_variance) * scale**2)


def scale_of(store: ActivationStore, hook_point: str, kind: str) -> float:
    """Return the factor by which `normalize_activations = kind` scales a hook point's centred rows.

    Raises:
        StoreError: the rows do not vary.
        NonFiniteError: their norms overflow float32.
    """
    if kind != "expected_average_only_in":
        return 1.0
    norm = mean_centred_norm(store, hook_point, torch.as_tensor(store.moments(hook_point).mean).to(torch.float32))
    where = f"the activations at '{hook_point}' in store '{store.path}'"
    if not norm > 0:
        raise StoreError(f"{where} do not vary in float32; harvest again")
    if not math.isfinite(norm):
        raise NonFiniteError(f"{where} are so large that their norms overflow float32; scale them down and store again")
    return store.d_in(hook_point) ** 0.5 / norm


def scale_of_raw_norm(store: ActivationStore, hook_point: str, kind: str) -> float:
    """Return the scale that earlier releases computed, from the mean norm of rows that were not centred."""
    scales = kind == "expected_average_only_in"
    return store.d_in(hook_point) ** 0.5 / store.moments(hook_point).mean_norm if scales else 1.0


def mean_centred_norm(store: ActivationStore, hook_point: str, mean: Float[Tensor, " d_in"]) -> float:
    """Return the mean of `||x - mean||` over training rows.

    The mean is exact for stores of up to 131,072 training rows. For larger stores it is computed over about as many, in
    evenly spaced chunks, which are always the same because the trained weights depend on it.
    """
    rows_per_chunk = store.training_rows_per_chunk()
    chunks = np.flatnonzero(rows_per_chunk)
    n_chosen = -(-len(chunks) * _SAMPLE_ROWS // max(int(rows_per_chunk.sum()), _SAMPLE_ROWS))
    chunks = chunks[np.arange(n_chosen) * len(chunks) // n_chosen]
    usable = TrainingRowMask(store)
    total, count = 0.0, 0
    for start in range(0, len(chunks), _CHUNKS_AT_ONCE):
        some = chunks[start : start + _CHUNKS_AT_ONCE]
        mask = torch.from_numpy(usable.of(some).reshape(-1))
        rows = store.read_chunks(hook_point, some)[mask].to(torch.float32).sub_(mean)
        # NumPy sums single-threaded; PyTorch's sum would depend on the number of threads.
        total += float(torch.linalg.vector_norm(rows, dim=1).numpy().sum(dtype=np.float64))
        count += len(rows)
    return total / count


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
    return Normalization(torch.cat([part.mean for part in parts]), scale, sum(part.total_variance for part in parts))
