"""The protocol of a step mode, which owns an SAE's weights and moments and takes steps with them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Protocol

import torch
from jaxtyping import Int64
from torch import Tensor

from ..architectures.contract import Batch, Number, Parameters


class Weights(Protocol):
    """Parameters and Adam's two moments by parameter, all changed in place."""

    parameters: Parameters
    exp_avg: Parameters
    exp_avg_sq: Parameters


class StepMode(Weights, Protocol):
    """How one SAE takes its steps: operation by operation (`OpByOp`), or in fused kernels (`FusedStep`).

    Both save their state under the same names, so that a run may resume in the other mode.
    """

    tokens_since_fired: Int64[Tensor, " d_sae"]
    compute_dtype: torch.dtype

    def needed(self, batch: Batch) -> Batch:
        """Return the part of a batch that a step reads; a captured step copies all of it."""
        ...

    def before(self, batch: Batch, steps_done: int, lr: float) -> Hashable | None:
        """Prepare a step on the host, and return everything that determines its launches, besides values on the device.

        Returns None if the step must wait for the device, or if the last one waited.
        """
        ...

    def take(self, batch: Batch, steps_done: int) -> dict[str, Number]:
        """Take a step and return its `loss`, `explained_variance`, `l0`, `dead_fraction` and other numbers.

        All of it may be captured. A latent that the step revives counts as dead. A step that diverges changes nothing
        if the host notices at once.
        """
        ...

    def refresh(self) -> None:
        """Update the copies of the weights that products read, after anything other than a step changed them."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later steps depend on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state."""
        ...
