"""What a step is given and what it returns, and what it asks of the other processes of its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

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

    `x_compute` is the copy that the encoder multiplies, in bfloat16 by default. `target` is what is reconstructed,
    or None where that is `x`.
    """

    x: Float[Tensor, "batch d_in"]
    x_compute: Float[Tensor, "batch d_in"]
    target: Float[Tensor, "batch d_out"] | None = None

    @property
    def y(self) -> Float[Tensor, "batch d_out"]:
        """Return what is reconstructed."""
        return self.x if self.target is None else self.target


class Collectives:
    """Reductions over the ranks that train one SAE together; this one is for a rank that trains it alone.

    An architecture writes its losses as means over the rows of its batch, whose gradients `combine` averages over
    ranks. What is not linear in such means (a ratio, a square, a selection over the batch) it takes from `mean`,
    `least` and `all_values`. Ranks that share one batch but not the latents use `over_latents`.
    """

    def rows(self, n_rows: int) -> int:
        """Return the rows of the whole batch, of which `n_rows` are here."""
        return n_rows

    def mean(self, number: Tensor) -> Tensor:
        """Return the mean over ranks of a number that is a mean or sum over rows."""
        return number

    def least(self, number: Tensor) -> Tensor:
        """Return the least of the ranks' numbers."""
        return number

    def all_values(self, values: Shaped[Tensor, " n ..."]) -> Shaped[Tensor, " all_n ..."]:
        """Return all ranks' values, in order of rank; each may have another number of them."""
        return values

    def combine(self, output: StepOutput) -> StepOutput:
        """Return the whole batch's step from that of the rows here."""
        return output

    def over_latents(self, total: Tensor) -> Tensor:
        """Return the sum, over all latents, of a total over the latents here."""
        return total

    def only_largest(self, values: Float[Tensor, "batch k_here"], k: int) -> Float[Tensor, "batch k_here"]:
        """Return the candidates with -inf for those that are not among their row's k largest over all latents."""
        return values

    def room_for_dead(self, dead: Bool[Tensor, " latents_here"]) -> int | None:
        """Return for how many dead latents here AuxK makes room; None where it counts them itself."""
        return None

    def gradient_norm(self, gradients: Parameters) -> Tensor:
        """Return the norm of all gradients together."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))


SINGLE_PROCESS = Collectives()


@dataclass(frozen=True)
class StepInput:
    """What a step depends on besides the parameters and the batch; `buffers` it may change in place.

    What is not a mean over the batch's rows goes through `across`, for they may be on several ranks. With `room`,
    selections find their entries without waiting for the device, in as much memory as that says; with `n_dead`, at
    most so many latents are dead. With `W_dec_compute`, sums over few latents may be in its precision, and
    weights' gradients left for the optimizer to compute by blocks. `step_number` is `steps_done` on the device, where
    a step may be captured: the host's is then that of the capture.
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
    W_dec_compute: Float[Tensor, "d_sae d_out"] | None = None


@dataclass
class StepOutput:
    """A step's gradients, the latents that fired, and its loss terms.

    On a CPU, the gradients of `W_enc` and `W_dec` may be deferred (see `kernels/gradient.py`).
    `mse` is the mean over rows of the squared error; `loss` is what the gradients are of. Numbers may be
    float64 tensors of no dimensions, which the host then reads only when it needs to.
    """

    gradients: Mapping[str, Gradient]
    fired: Bool[Tensor, " d_sae"]
    loss: Number
    mse: Number
    l0: Number
    terms: dict[str, Number] = field(default_factory=dict)
