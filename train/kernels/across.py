"""The reductions over ranks that kernels ask for, where several ranks train one SAE together."""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor


class Across:
    """Reductions over the ranks that train one SAE together. This base class is for a single rank.

    Ranks share either the rows of every batch or the latents. Reductions over what they do not share return their
    argument.
    """

    shares_latents = False

    def rows(self, n_rows: int) -> int:
        """Return the number of rows of the whole batch, of which this rank has `n_rows`."""
        return n_rows

    def rows_before(self, n_rows: int) -> int:
        """Return how many rows of the whole batch come before those of this rank, which has `n_rows`."""
        return 0

    def all_rows(self, *values: Shaped[Tensor, "_ ..."]) -> tuple[Shaped[Tensor, "_ ..."], ...]:
        """Return values of the whole batch's rows, given those of this rank's; every rank has as many."""
        return values

    def all_values(self, values: Shaped[Tensor, " n ..."]) -> Shaped[Tensor, " all_n ..."]:
        """Return all ranks' values, concatenated in order of rank; their lengths may differ."""
        return values

    def over_rows(self, *totals: Tensor) -> None:
        """Change totals over this rank's rows to totals over the whole batch, in place."""

    def over_latents(self, total: Tensor) -> Tensor:
        """Return the sum over all latents, given the total over this rank's latents."""
        return total

    def only_largest(self, values: Float[Tensor, "batch k_here"], k: int) -> Float[Tensor, "batch k_here"]:
        """Set candidates to -inf unless they are among their row's k largest over all latents."""
        return values
