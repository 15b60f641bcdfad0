"""What a training step must learn from the other ranks of its run; alone, nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

if TYPE_CHECKING:
    from ..architectures.base import Architecture, Parameters, StepOutput
    from .ranks import Ranks


class Across:
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

    def shard(self, architecture: Architecture) -> Architecture:
        """Return the architecture that trains the latents here."""
        return architecture

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


class AmongRanks(Across):
    """The reductions that are the same however ranks share the work."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def least(self, number: Tensor) -> Tensor:
        """Return the least of the ranks' numbers; in float32, which every backend can compare."""
        found = number.float().clone()
        self.ranks.least(found)
        return found.to(number.dtype)

    def all_values(self, values: Shaped[Tensor, " n ..."]) -> Shaped[Tensor, " all_n ..."]:
        """Return all ranks' values, in order of rank."""
        return self.ranks.concatenate(values)


ALONE = Across()
