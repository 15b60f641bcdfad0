"""Compute a norm's result before its weight and bias, which TransformerLens calls `hook_normalized`."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from ..loading.placement import loaded
from .scales import same

_EPSILONS = ("eps", "variance_epsilon", "epsilon", "norm_eps")


class Affine(NamedTuple):
    """A norm of the form `normalize(x) * (offset + weight) + bias`; with `centres`, the mean is subtracted first."""

    centres: bool
    offset: float
    eps: float

    def normalize(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return `x` normalised, computed in float32 and returned in the data type of `x`."""
        wide = x.float()
        if self.centres:
            wide = wide - wide.mean(dim=-1, keepdim=True)
        return (wide * (wide.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)

    def apply(self, norm: nn.Module, normalized: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Apply the norm's weight and bias to a normalised activation."""
        weight, bias = parameters_of(norm)
        wide = normalized.float()
        if weight is not None:
            wide = wide * (self.offset + weight.to(wide))
        if bias is not None:
            wide = wide + bias.to(wide)
        return wide.to(normalized.dtype)


def parameters_of(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return a norm's weight and bias, each None if it has none."""
    weight, bias = loaded(norm, "weight"), loaded(norm, "bias")
    return (
        weight if weight is not None and weight.ndim == 1 else None,
        bias if bias is not None and bias.ndim == 1 else None,
    )


def affine_of(norm: nn.Module, x: Float[Tensor, "*batch d"], result: Float[Tensor, "*shape"]) -> Affine | None:
    """Return the `Affine` with which `norm` maps `x` to `result`, or None if no known form fits."""
    own = [value for name in _EPSILONS if isinstance(value := getattr(norm, name, None), float)]
    for eps in own or (1e-5, 1e-6):
        for centres in (True, False):
            for offset in (0.0, 1.0):
                affine = Affine(centres, offset, eps)
                if x.shape == result.shape and same(affine.apply(norm, affine.normalize(x)), result):
                    return affine
    return None
