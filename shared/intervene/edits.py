"""What an intervention does to a latent or a direction, and at which tokens.

An edit maps a latent's activation to another one. Along a decoder row `w` with unit vector `v = w / |w|`, `Orthogonal`
and `ProjectionCap` instead change the activation's own projection `<x, v>`, whatever the latent says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..core.errors import InterventionError

Unit = Literal["activation", "max"]


@dataclass(frozen=True)
class Fires:
    """The tokens at which another latent is above a threshold: `where=Fires("blocks.2.resid_post", 17)`."""

    hook_point: str
    latent: int
    above: float = 0.0


Where = str | int | slice | range | Sequence[int] | Fires
"""At which tokens an edit acts.

"all"; "prompt" or "generated"; "active", where the latent itself fires; a position, slice, range or list of positions,
counted from a text's first token, or backwards from the end of the prompt; or where another latent fires.
"""
NAMED = ("all", "prompt", "generated", "active")


@dataclass(frozen=True)
class Edit:
    """An edit of one latent, `where` it acts and the `unit` of its strengths.

    `unit="max"` means multiples of the latent's largest activation, which the model must know (`SaeModel.maxima`).
    """

    where: Where = field(default="all", kw_only=True)
    unit: Unit = field(default="activation", kw_only=True)

    def __post_init__(self) -> None:
        """Check `where` and `unit`."""
        if isinstance(self.where, str) and self.where not in NAMED:
            raise InterventionError(
                f"where is '{self.where}'; expected {', '.join(NAMED)}, positions, or Fires(hook_point, latent)"
            )
        if self.unit not in ("activation", "max"):
            raise InterventionError(f"unit is '{self.unit}'; expected activation or max")

    @property
    def projects(self) -> bool:
        """Whether the edit changes the activation's projection, not what the latent says."""
        return False

    def value(self, activation: Float[Tensor, " rows"], one: float) -> Float[Tensor, " rows"]:
        """Return the new activations (or projections), with `one` the size of a unit.

        A derived edit defines it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Add(Edit):
    """Add `amount` to the latent, which adds `amount` times its decoder row to the activation."""

    amount: float

    def value(self, activation: Tensor, one: float) -> Tensor:
        return activation + self.amount * one


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply the latent by `factor`."""

    factor: float

    def value(self, activation: Tensor, one: float) -> Tensor:
        return activation * self.factor


@dataclass(frozen=True)
class Clamp(Edit):
    """Set the latent to `low`, or with `high` keep it between both."""

    low: float
    high: float | None = None

    def __post_init__(self) -> None:
        """Check that the bounds are in order."""
        super().__post_init__()
        if self.high is not None and not self.low <= self.high:
            raise InterventionError(f"Clamp({self.low}, {self.high}): the lower bound is above the upper")

    def value(self, activation: Tensor, one: float) -> Tensor:
        if self.high is None:
            return torch.full_like(activation, self.low * one)
        return activation.clamp(self.low * one, self.high * one)


@dataclass(frozen=True)
class Ablate(Edit):
    """Set the latent to zero, or to `to`, such as its mean."""

    to: float = 0.0

    def value(self, activation: Tensor, one: float) -> Tensor:
        return torch.full_like(activation, self.to * one)


@dataclass(frozen=True)
class Orthogonal(Edit):
    """Multiply the activation's projection on the decoder row by `keep`: `x - P x + keep P x`, with P the projector."""

    keep: float = 0.0

    @property
    def projects(self) -> bool:
        return True

    def value(self, activation: Tensor, one: float) -> Tensor:
        return activation * self.keep


@dataclass(frozen=True)
class ProjectionCap(Edit):
    """Keep the activation's projection on the decoder row's unit vector between `low` and `high`."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        """Check that the bounds are in order."""
        super().__post_init__()
        if not self.low <= self.high:
            raise InterventionError(f"ProjectionCap({self.low}, {self.high}): the lower bound is above the upper")

    @property
    def projects(self) -> bool:
        return True

    def value(self, activation: Tensor, one: float) -> Tensor:
        return activation.clamp(self.low * one, self.high * one)


def places(
    where: Where, position: Int64[Tensor, "batch context"], n_prompt: Int64[Tensor, " batch"]
) -> Bool[Tensor, "batch context"]:
    """Return where an edit may act, as far as positions alone decide it.

    `position` counts from each text's first token and is negative at padding; `n_prompt` is the length of each prompt.
    """
    real = position >= 0
    if isinstance(where, Fires) or where in ("all", "active"):
        return real
    if where == "prompt":
        return real & (position < n_prompt[:, None])
    if where == "generated":
        return real & (position >= n_prompt[:, None])
    if isinstance(where, slice):
        return real & _in_slice(where, position, n_prompt)
    wanted = [where] if isinstance(where, int) else [int(at) for at in where]  # pyright: ignore[reportGeneralTypeIssues]
    chosen = torch.zeros_like(real)
    for at in wanted:
        chosen |= position == (at if at >= 0 else n_prompt[:, None] + at)
    return real & chosen


def _in_slice(where: slice, position: Tensor, n_prompt: Tensor) -> Tensor:
    """Return which positions a slice takes; without an end it goes on into what is generated."""
    step = 1 if where.step is None else int(where.step)
    if step < 1:
        raise InterventionError(f"a slice of positions needs a step of at least 1, got {step}")

    def bound(value: int) -> Tensor:
        return torch.full_like(n_prompt, value) if value >= 0 else (n_prompt + value).clamp_min(0)

    start = bound(where.start or 0)[:, None]
    chosen = (position >= start) & ((position - start) % step == 0)
    return chosen if where.stop is None else chosen & (position < bound(where.stop)[:, None])
