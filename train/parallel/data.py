"""Data-parallel training of one SAE: each rank takes its slice of every batch, and gradients are averaged.

A deferred gradient (`kernels/gradient.py`) is averaged in one of two ways. If few of a batch's entries belong to each
latent, ranks exchange entries with the rows of `x` and of the error, and every rank computes the gradient of the whole
batch in its update, in the order of one process. Otherwise gradients are written and summed as tensors are, because a
rank would spend more time on the other ranks' entries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Shaped
from torch import Tensor

from ..architectures.contract import StepOutput
from .collectives import RankCollectives

_MOST_ENTRIES = 12
"""Entries per latent in the rows of other ranks, up to which they are exchanged.

`benchmarks/data_exchange.py` measures what exchanging them takes: of 11, 21 and 42 it took 14% and 6% less CPU time,
and 4% more, than exchanging gradients with 2 processes.
"""


class DataParallel(RankCollectives):
    """The ranks' slices have equal sizes, so that the mean of their gradients is the whole batch's gradient."""

    def rows(self, n_rows: int) -> int:
        """Return the rows of the whole batch."""
        return n_rows * self.ranks.n

    def rows_before(self, n_rows: int) -> int:
        """Return the rows of the ranks before this one."""
        return n_rows * self.ranks.rank

    def all_rows(self, *values: Shaped[Tensor, "_ ..."]) -> tuple[Shaped[Tensor, "_ ..."], ...]:
        """Return the values of all ranks' rows, in order of rank, without waiting for the device."""
        return tuple(every.flatten(0, 1) for every in self.ranks.stack(*values))

    def over_rows(self, *totals: Tensor) -> None:
        """Add the other ranks' totals, in place."""
        self.ranks.add(*totals)

    def mean(self, number: Tensor) -> Tensor:
        """Return the mean over ranks."""
        number = number.clone()
        self.ranks.add(number)
        return number / self.ranks.n

    def combine(self, output: StepOutput) -> StepOutput:
        """Return the mean of the ranks' gradients and numbers, and which latents fired on any rank."""
        n, device = self.ranks.n, output.fired.device
        deferred = {name: g for name, g in output.gradients.items() if not isinstance(g, Tensor)}
        gradients = {name: g.contiguous() for name, g in output.gradients.items() if isinstance(g, Tensor)}
        n_entries = [gradient.n_entries for gradient in deferred.values()]
        numbers = [output.loss, output.mse, output.l0, *output.terms.values(), *n_entries]
        packed = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
        fired = output.fired.to(torch.uint8)
        self.ranks.add(packed, *gradients.values())
        self.ranks.greatest(fired)
        if deferred:
            first, *others = deferred.values()
            elsewhere = float(packed[-1]) * (n - 1) / n
            if elsewhere <= _MOST_ENTRIES * first.shape[0]:
                deferred = dict(zip(deferred, first.means_of_ranks(others, self), strict=True))
            else:
                gradients |= {name: gradient[:] for name, gradient in deferred.items()}
                self.ranks.add(*(gradients[name] for name in deferred))
                deferred = {}
        packed = packed[: len(numbers) - len(n_entries)] / n
        for gradient in gradients.values():
            gradient /= n
        loss, mse, l0, *terms = packed.unbind() if device.type == "cuda" else packed.tolist()
        return replace(
            output,
            gradients=gradients | deferred,
            fired=fired.bool(),
            loss=loss,
            mse=mse,
            l0=l0,
            terms=dict(zip(output.terms, terms, strict=True)),
        )
