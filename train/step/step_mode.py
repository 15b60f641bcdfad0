"""The protocol of a mode of stepping: it owns an SAE's weights and moments, and takes steps with them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..architectures.contract import Batch, Number, Parameters


class Weights(Protocol):
    """Parameters and Adam's two moments by parameter, all changed in place."""

    parameters: Parameters
    exp_avg: Parameters
    exp_avg_sq: Parameters


class StepMode(Weights, Protocol):
    """How one SAE takes its steps: operation by operation (`OpByOp`), or in fused kernels (`FusedStep`).

    Both give their state the same names, so that a run may resume in the other mode.
    """

    tokens_since_fired: Int64[Tensor, " d_sae"]
    compute_dtype: torch.dtype

    def needed(self, batch: Batch) -> Batch:
        """Return what a step reads of a batch; a captured step copies all of it."""
        ...

    def before(self, batch: Batch, steps_done: int, lr: float) -> Hashable | None:
        """Prepare a step on the host, and return all that its launches follow from besides what is on the device.

        Return None where the step must wait for the device, or the last one has waited.
        """
        ...

    def take(
        self, batch: Batch, steps_done: int, dead: Bool[Tensor, " d_sae"], n_dead: Float[Tensor, ""]
    ) -> dict[str, Number]:
        """Take a step and return its `loss`, `mse`, `l0` and other numbers; all of it may be captured.

        `dead` are the dead latents here, `n_dead` their number over all ranks. A step that diverges where the host
        notices at once changes nothing.
        """
        ...

    def refresh(self) -> None:
        """Copy the weights to where products read them, after something other than a step has changed them."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a later step depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state."""
        ...
