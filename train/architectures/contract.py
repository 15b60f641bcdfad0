"""The contract of a step: its inputs, its outputs, and the reductions that it may request from other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..kernels.across import Across
from ..kernels.backend import Backend
from ..kernels.capacity import EntryCapacity
from ..kernels.gradient import Gradient

Parameters = dict[str, Tensor]
Buffers = dict[str, Tensor]
Number = float | Tensor

_PER_LATENT = {"W_enc", "b_enc", "W_dec", "tokens_since_fired"}


def is_per_latent(name: str) -> bool:
    """Return whether a tensor of the state of an SAE that ranks may share has a row per latent, unless it is a number.

    Names may have prefixes, as in checkpoints.
    """
    return name.split(".")[-1] in _PER_LATENT


@dataclass(frozen=True)
class Batch:
    """A normalised batch, shared by the SAEs that read and write the same hook points.

    `x_compute` is the copy that the encoder multiplies, in bfloat16 by default. `target` is the tensor to reconstruct,
    or None if that is `x`. Very long rows are shortened. For an architecture that `weighs_rows` they are not, and
    `row_weights` are the factors that would shorten them (None: all are 1).
    """

    x: Float[Tensor, "batch d_in"]
    x_compute: Float[Tensor, "batch d_in"]
    target: Float[Tensor, "batch d_out"] | None = None
    row_weights: Float[Tensor, "batch 1"] | None = None

    @property
    def y(self) -> Float[Tensor, "batch d_out"]:
        """The tensor to reconstruct."""
        return self.x if self.target is None else self.target


class L0Target(NamedTuple):
    """The L0 that a controller of the penalty's factor reaches, and how.

    `first_factor` is the factor at first. The controller's gain goes from `gain` to `last_gain` over the run.
    `least_factor` is the smallest that its integral keeps: where L0 stays below its target for long, a factor that had
    become far smaller would take as long to return.
    """

    l0: float
    first_factor: float
    gain: float = 40.0
    last_gain: float = 40.0
    least_factor: float = 0.0


class Collectives(Across):
    """Reductions over the ranks that train one SAE together. This base class is for a single rank.

    An architecture writes its losses as means over the rows of its batch, and `combine` averages their gradients over
    ranks. For anything that is not linear in such means (a ratio, a square, a selection over the batch), it calls
    `mean`, `least` and `all_values`. Ranks that share the batch but divide the latents use `over_latents`.
    """

    def mean(self, number: Tensor) -> Tensor:
        """Return the mean over ranks of a number, which is a mean or sum over rows."""
        return number

    def least(self, number: Tensor) -> Tensor:
        """Return the minimum of a number over ranks."""
        return number

    def combine(self, output: StepOutput) -> StepOutput:
        """Return the whole batch's output from the output for this rank's rows."""
        return output

    def most_over_latents(self, numbers: Tensor) -> Tensor:
        """Return the elementwise maximum over the ranks that share the latents."""
        return numbers

    def room_for_dead(self, dead: Bool[Tensor, " latents_here"]) -> int | None:
        """Return the number of this rank's dead latents that AuxK allocates for; None if it counts them itself."""
        return None

    def gradient_norm(self, gradients: Parameters) -> Tensor:
        """Return the global norm of all gradients."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))


SINGLE_PROCESS = Collectives()


@dataclass(frozen=True)
class StepInput:
    """The inputs of a step besides the parameters and the batch. The step may change `buffers` in place.

    Anything that is not a mean over the batch's rows must be reduced with `across`, because the rows may be on several
    ranks. With `room`, selections write to buffers of that capacity and do not wait for the device. `n_dead` is an
    upper bound on the number of dead latents. With `W_dec_compute`, sums over few latents may be in its precision, and
    the gradients of the weights may be deferred to the optimizer. `step_number` is `steps_done` on the device, for
    steps that may be captured: the host's value would be that of the capture.
    """

    kernels: Backend
    W_enc_compute: Float[Tensor, "d_sae d_in"]
    total_variance: float
    dead: Bool[Tensor, " d_sae"] | None = None
    sparsity_scale: Number = 1.0
    buffers: Buffers = field(default_factory=dict)
    steps_done: int = 0
    step_number: Float[Tensor, ""] | None = None
    across: Collectives = SINGLE_PROCESS
    room: EntryCapacity | None = None
    n_dead: int | None = None
    W_dec_compute: Float[Tensor, "rows d_out"] | None = None


@dataclass
class StepOutput:
    """A step's gradients, the latents that fired, and its loss terms.

    On a CPU, the gradients of `W_enc` and `W_dec` may be deferred (see `kernels/gradient.py`). `loss` is the value that
    the gradients belong to, and `mse` the mean over rows of the squared error. Numbers may be zero-dimensional float64
    tensors, which the host reads only when it needs them.
    """

    gradients: Mapping[str, Gradient]
    fired: Bool[Tensor, " d_sae"]
    loss: Number
    mse: Number
    l0: Number
    terms: dict[str, Number] = field(default_factory=dict)
