"""A weight's gradient: a tensor, or a promise of its rows that the optimizer redeems block by block.

Writing a large gradient to memory and reading it again costs a CPU more than computing it does. The cpu backend
therefore leaves the gradients of `W_enc` and `W_dec` uncomputed until the optimizer asks for a block of their rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class DeferredGradient(Protocol):
    """The gradient of a matrix with a row per latent, computed when its rows are read."""

    dtype: torch.dtype
    shape: torch.Size

    def __getitem__(self, latents: slice, /) -> Float[Tensor, "n d"]:
        """Return new rows, which the caller may change."""
        ...

    def add_outer(self, by_latent: Float[Tensor, " d_sae"], direction: Float[Tensor, " d"], alpha: float) -> None:
        """Add `alpha by_latent direction^T`."""
        ...

    def add_rows(self, latents: Int64[Tensor, " n"], rows: Float[Tensor, "n d"]) -> None:
        """Add a row to each of some latents, given in ascending order."""
        ...


class DeferGradient(Protocol):
    """Makes the gradient `values^T source` of entries that are sorted by latent."""

    def __call__(self, csc: Any, values: Float[Tensor, " nnz"], source: Float[Tensor, "batch d"]) -> DeferredGradient:
        """Return the gradient; its terms have the precision of `source`."""
        ...


Gradient = Tensor | DeferredGradient
"""The gradient of one parameter; `gradient[rows]` are some of its rows either way."""


def whole(gradient: Gradient) -> Tensor:
    """Return all rows of a gradient; those of a deferred one are computed."""
    return gradient if isinstance(gradient, Tensor) else gradient[:]


def add_rows(gradient: Gradient, latents: Int64[Tensor, " n"], rows: Float[Tensor, " n *d"]) -> None:
    """Add a row to each of some latents, given in ascending order; a tensor is changed in place."""
    if isinstance(gradient, Tensor):
        gradient[latents] += rows
    else:
        gradient.add_rows(latents, rows)
