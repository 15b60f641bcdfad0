"""A weight's gradient: a tensor, or a deferred gradient whose rows are computed when the optimizer reads them.

On a CPU, writing a large gradient to memory and reading it again costs more than computing it. The cpu backend
therefore defers the gradients of `W_enc` and `W_dec` until the optimizer reads a block of their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .across import Across


class DeferredGradient(Protocol):
    """The gradient of a matrix with a row per latent, computed when its rows are read."""

    dtype: torch.dtype
    shape: torch.Size
    n_entries: int

    def __getitem__(self, latents: slice, /) -> Float[Tensor, "n d"]:
        """Return new rows, which the caller may change."""
        ...

    def add_outer(self, by_latent: Float[Tensor, " d_sae"], direction: Float[Tensor, " d"], alpha: float) -> None:
        """Add `alpha by_latent direction^T`."""
        ...

    def add_rows(self, latents: Int64[Tensor, " n"], rows: Float[Tensor, "n d"]) -> None:
        """Add a row to each of some latents, given in ascending order."""
        ...

    def means_of_ranks(self, others: Sequence[Self], across: Across) -> list[Self]:
        """Return the means over ranks of this gradient and of others of the same entries, deferred as well.

        Ranks exchange entries and rows of `source` instead of gradients, and each latent's sum is over the entries of
        the whole batch in order of row. All ranks must have added rows to the same latents.
        """
        ...


class DeferGradient(Protocol):
    """Creates the deferred gradient `values^T source` of entries that are sorted by latent."""

    def __call__(self, csc: Any, values: Float[Tensor, " nnz"], source: Float[Tensor, "batch d"]) -> DeferredGradient:
        """Return the gradient; its terms are computed in the precision of `source`."""
        ...


Gradient = Tensor | DeferredGradient
"""The gradient of one parameter; `gradient[rows]` returns rows of either kind."""


def whole(gradient: Gradient) -> Tensor:
    """Return all rows of a gradient, computing those of a deferred one."""
    return gradient if isinstance(gradient, Tensor) else gradient[:]


def add_rows(gradient: Gradient, latents: Int64[Tensor, " n"], rows: Float[Tensor, " n *d"]) -> None:
    """Add a row to each of some latents, given in ascending order; a tensor is changed in place."""
    if isinstance(gradient, Tensor):
        gradient[latents] += rows
    else:
        gradient.add_rows(latents, rows)
