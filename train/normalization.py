"""Input normalisation from a store's exact moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from ..shared.store import ActivationStore


@dataclass(frozen=True)
class Normalization:
    """`x -> (x - mean) * scale`; `total_variance` is that of the result, summed over channels."""

    mean: Float[Tensor, " d_in"]
    scale: float
    total_variance: float

    def apply(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return the batch in float32, centred and scaled."""
        return x.to(torch.float32).sub(self.mean.to(x.device)).mul_(self.scale)


def normalization_of(store: ActivationStore, hook_point: str, kind: str) -> Normalization:
    """Return a hook point's normalisation: `expected_average_only_in` gives a mean norm of sqrt(d_in)."""
    moments = store.moments(hook_point)
    scale = store.d_in(hook_point) ** 0.5 / moments.mean_norm if kind == "expected_average_only_in" else 1.0
    mean = torch.as_tensor(moments.mean).to(torch.float32)
    return Normalization(mean, float(scale), float(moments.total_variance) * scale**2)
