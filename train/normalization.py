"""Input normalisation from a store's exact moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from ..shared.store import ActivationStore
    from .config import SaeConfig


@dataclass(frozen=True)
class Normalization:
    """`x -> (x - mean) * scale`; `total_variance` is that of what is reconstructed, summed over channels.

    A transcoder's target has a normalisation of its own.
    """

    mean: Float[Tensor, " d_in"]
    scale: float | Float[Tensor, " d_in"]
    total_variance: float
    target: Normalization | None = None

    def to(self, device: torch.device | str) -> Normalization:
        """Return the same with its mean on a device, so that applying it copies nothing there."""
        scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        target = self.target.to(device) if self.target else None
        return replace(self, mean=self.mean.to(device), scale=scale, target=target)

    def identity(self) -> Normalization:
        """Return a normalisation of the same widths that changes nothing."""
        target = self.target.identity() if self.target else None
        return Normalization(torch.zeros_like(self.mean), 1.0, 1.0, target)

    def apply(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return the batch in float32, centred and scaled."""
        return x.to(torch.float32).sub(self.mean.to(x.device)).mul_(self.scale)


def normalization_of(store: ActivationStore, hook_point: str, kind: str) -> Normalization:
    """Return a hook point's normalisation: `expected_average_only_in` gives a mean norm of sqrt(d_in)."""
    moments = store.moments(hook_point)
    scale = store.d_in(hook_point) ** 0.5 / moments.mean_norm if kind == "expected_average_only_in" else 1.0
    mean = torch.as_tensor(moments.mean).to(torch.float32)
    return Normalization(mean, float(scale), float(moments.total_variance) * scale**2)


def normalization_across(sae: SaeConfig, by_hook: Mapping[str, Normalization]) -> Normalization:
    """Return an SAE's normalisation: a crosscoder's of all its hook points, a transcoder's with its target's."""
    parts = [by_hook[hook] for hook in sae.inputs]
    if sae.hook_point_out is not None:
        target = by_hook[sae.hook_point_out]
        return replace(parts[0], total_variance=target.total_variance, target=target)
    if len(parts) == 1:
        return parts[0]
    scale = torch.cat([torch.full_like(part.mean, float(part.scale)) for part in parts])
    return Normalization(torch.cat([part.mean for part in parts]), scale, sum(part.total_variance for part in parts))
