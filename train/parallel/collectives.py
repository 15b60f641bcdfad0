"""The reductions that all ways of sharing one SAE's training over ranks have in common."""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor

from ..architectures.contract import Collectives
from .ranks import TrainRanks


class RankCollectives(Collectives):
    """The reductions that do not depend on how ranks share the work."""

    def __init__(self, ranks: TrainRanks):
        self.ranks = ranks

    def least(self, number: Tensor) -> Tensor:
        """Return the minimum of a number over ranks; in float32, which every backend supports."""
        found = number.float().clone()
        self.ranks.least(found)
        return found.to(number.dtype)

    def all_values(self, values: Shaped[Tensor, " n ..."]) -> Shaped[Tensor, " all_n ..."]:
        """Return all ranks' values, in order of rank."""
        return self.ranks.concatenate(values)
