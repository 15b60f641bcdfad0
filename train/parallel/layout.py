"""The distribution of a sweep over ranks: which SAEs a rank trains, on which rows of each batch, and which it saves.

| `parallel` | a rank trains | on | and exchanges |
|---|---|---|---|
| `spread` | some whole SAEs | every batch | nothing |
| `data` | every SAE | its slice of every batch | gradients |
| `latents` | some latents of every SAE | every batch | candidates and partial reconstructions |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...shared.core.errors import ConfigError
from ..architectures.base import Architecture
from ..architectures.contract import SINGLE_PROCESS, Collectives
from .data import DataParallel
from .latents import LatentShards
from .ranks import TrainRanks

if TYPE_CHECKING:
    from ..config import SaeConfig


def spread(costs: Sequence[int], n_ranks: int) -> list[int]:
    """Assign each SAE to a rank: in order of decreasing cost, each to the rank with the lowest total so far."""
    loads, owners = [0] * n_ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def trained_on(parallel: str, costs: Sequence[int], n_ranks: int) -> list[list[int]]:
    """Return the numbers of the SAEs that each rank trains, whole or a part of, when they are spread by their costs."""
    if parallel != "spread":
        return [list(range(len(costs)))] * n_ranks
    owners = spread(costs, n_ranks)
    return [[sae for sae, owner in enumerate(owners) if owner == rank] for rank in range(n_ranks)]


@dataclass(frozen=True)
class Layout:
    """A rank's share of a sweep; `savers` holds the rank that saves each SAE.

    Raises:
        ConfigError: some rank would have nothing to train.
    """

    ranks: TrainRanks = field(default_factory=TrainRanks)
    parallel: str = "spread"
    savers: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, parallel: str, n_parameters: Mapping[str, int], ranks: TrainRanks) -> Layout:
        """Distribute a sweep over ranks by its SAEs' numbers of parameters."""
        if parallel == "spread" and len(n_parameters) < ranks.n:
            raise ConfigError(
                f"{ranks.n} processes have {len(n_parameters)} SAEs to train; start as many at most, "
                "or train each SAE on all of them with parallel = 'data' or 'latents'"
            )
        owners = spread(list(n_parameters.values()), ranks.n)
        return cls(ranks, parallel, dict(zip(n_parameters, owners, strict=True)))

    @cached_property
    def across(self) -> Collectives:
        """Return the reductions that combine this rank's steps with those of the others."""
        if self.ranks.n == 1 or self.parallel == "spread":
            return SINGLE_PROCESS
        return DataParallel(self.ranks) if self.parallel == "data" else LatentShards(self.ranks)

    def shard(self, architecture: Architecture[Any]) -> Architecture[Any]:
        """Return the architecture that trains the latents here: as it is, unless ranks share them."""
        latents = self.latents_here(architecture.d_sae)
        return architecture if latents is None else architecture.sharded(latents)

    def saves(self, name: str) -> bool:
        """Return whether this rank writes an SAE's files."""
        return self.savers.get(name, 0) == self.ranks.rank

    def saes_here(self, saes: Sequence[SaeConfig]) -> list[SaeConfig]:
        """Return the SAEs that this rank trains, entirely or in part."""
        return [sae for sae in saes if self.parallel != "spread" or self.saves(str(sae.name))]

    @property
    def batch_slice(self) -> tuple[int, int]:
        """Return (i, n): this rank reads slice i of the n slices of every batch."""
        return (self.ranks.rank, self.ranks.n) if self.parallel == "data" else (0, 1)

    def whole(self, name: str, tensors: Mapping[str, Tensor], d_sae: int) -> Mapping[str, Tensor]:
        """Return an SAE's full tensors on the rank that saves it; all ranks that train it must call this."""
        if isinstance(self.across, LatentShards):
            return self.across.whole(tensors, d_sae, self.savers[name])
        return tensors

    def latents_here(self, d_sae: int) -> slice | None:
        """Return the latents of an SAE that this rank trains, or None for all."""
        return self.ranks.part(d_sae) if isinstance(self.across, LatentShards) else None
