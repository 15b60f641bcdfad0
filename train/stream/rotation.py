"""Rotation of normalised rows to the principal axes of their hook point.

Adam scales coordinates one by one, so that what it reaches depends on the basis. Where the gradients' covariance is
diagonal, it is close to a full preconditioner (SOAP, arXiv 2409.11321). The eigenvectors of the rows' covariance are
such a basis for the encoder, and nearly one for the decoder. They cost one product per batch, which all SAEs of a hook
point share. Distances and products of rows stay the same, and saved SAEs are rotated back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ...shared.core.errors import NonFiniteError
from ..kernels.reference import shortening
from .sample import centred_rows

if TYPE_CHECKING:
    from ...shared.store import ActivationStore

_LEAST_ROWS, _ROWS_PER_CHANNEL = 1 << 15, 8


@dataclass(frozen=True)
class Rotation:
    """`x -> x V`, for rows of several hook points side by side, each with an orthogonal matrix `V` of its own."""

    axes: tuple[Float[Tensor, "d d"], ...]

    def __call__(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return rows in the principal axes of their hook points."""
        if len(self.axes) == 1:
            return rows @ self.axes[0]
        parts = rows.chunk(len(self.axes), dim=-1)
        return torch.cat([part @ V for part, V in zip(parts, self.axes, strict=True)], dim=-1)

    @property
    def inverse(self) -> Rotation:
        """Return the rotation back to the coordinates of the hook points."""
        return Rotation(tuple(V.T for V in self.axes))

    def to(self, device: torch.device | str) -> Rotation:
        """Return this rotation on a device."""
        return Rotation(tuple(V.to(device) for V in self.axes))


def principal_axes(store: ActivationStore, hook_point: str, scale: float, max_norm: float) -> Float[Tensor, "d d"]:
    """Return the eigenvectors, as columns, of the covariance of normalised training rows, by ascending variance.

    Centred rows are multiplied by `scale`, then shortened to `max_norm`. There are at least eight per channel, in
    evenly spaced chunks. Sums are in float64, because channels may differ in variance by a factor of 10^7.

    Raises:
        NonFiniteError: the covariance overflows.
    """
    d = store.d_in(hook_point)
    covariance, n_rows = torch.zeros(d, d, dtype=torch.float64), 0
    for rows in centred_rows(store, hook_point, max(_LEAST_ROWS, _ROWS_PER_CHANNEL * d)):
        x = rows.double() * scale
        x *= shortening(x, max_norm)
        covariance.addmm_(x.T, x)
        n_rows += len(x)
    covariance /= n_rows
    if not bool(covariance.isfinite().all()):
        raise NonFiniteError(
            f"the activations at '{hook_point}' in store '{store.path}' have no finite covariance; scale them down and "
            'store again, or train with rotation = "none"'
        )
    return torch.linalg.eigh(covariance).eigenvectors.float().contiguous()
