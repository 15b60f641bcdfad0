"""A step's numbers, on the host or on the device: the learning rate, schedules, and whether training has diverged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ..architectures.contract import Number
from ..kernels.fused_state import DivergenceWatch

_EXPLOSION = 1e4


def read_metrics(metrics: Mapping[str, Number]) -> dict[str, float]:
    """Return the numbers, those on a device in one transfer."""
    names = [name for name, value in metrics.items() if isinstance(value, Tensor)]
    read = torch.stack([torch.as_tensor(metrics[name]).double() for name in names]).tolist() if names else []
    there = dict(zip(names, read, strict=True))
    return {name: there[name] if name in there else float(value) for name, value in metrics.items()}


class StepNumbers(Protocol):
    """The numbers that change at every step, kept on the host or on the device.

    `diverged` says why training stopped early, if it did.
    """

    diverged: str | None

    @property
    def lr(self) -> float | Tensor:
        """The step's learning rate."""
        ...

    @property
    def undecayed_lr(self) -> float | Tensor:
        """The step's learning rate for parameters whose rate does not fall at the end of the run."""
        ...

    @property
    def sparsity_scale(self) -> Number:
        """The factor of the sparsity penalty."""
        ...

    @property
    def step_number(self) -> Float[Tensor, ""] | None:
        """The number of steps before this one, on the device; None if only the host knows it."""
        ...

    def set(self, steps_done: int, lr: float, sparsity_scale: float, undecayed_lr: float) -> None:
        """Set the numbers of the next step."""
        ...

    def resume(self, steps_done: int) -> None:
        """Continue after a number of steps."""
        ...

    def begin(self) -> None:
        """Count a step; this and what follows may be captured."""
        ...

    @property
    def watch(self) -> DivergenceWatch | None:
        """Where a fused step notes on the device that it diverged; None if the caller notes its loss and error."""
        ...

    def note(self, loss: Number, mse: Number) -> None:
        """Record a step's loss and error, which show whether it diverged."""
        ...

    def check(self) -> None:
        """Set `diverged` if a step has diverged."""
        ...

    def read(self, metrics: dict[str, Number]) -> dict[str, Number]:
        """Return a step's metrics in the form that its caller gets."""
        ...


class HostNumbers:
    """Numbers of steps on a CPU: they are read at once, and a step that diverges has no effect."""

    step_number: Float[Tensor, ""] | None = None
    watch: DivergenceWatch | None = None

    def __init__(self, total_variance: float):
        self.diverged: str | None = None
        self.lr = self.undecayed_lr = 0.0
        self.sparsity_scale = 1.0
        self._limit = _EXPLOSION * total_variance
        self._steps_done = 0

    def set(self, steps_done: int, lr: float, sparsity_scale: float, undecayed_lr: float) -> None:
        """Set the numbers of the next step."""
        self._steps_done, self.lr, self.sparsity_scale = steps_done, lr, sparsity_scale
        self.undecayed_lr = undecayed_lr

    def resume(self, steps_done: int) -> None:
        """Do nothing, because `set` receives the number of every step."""

    def begin(self) -> None:
        """Do nothing, because `set` receives the number of every step."""

    def note(self, loss: Number, mse: Number) -> None:
        """Set `diverged` if the loss is not finite, or the error too large."""
        if not math.isfinite(loss) or mse > self._limit:
            self.diverged = _failure(self._steps_done + 1, float(loss), float(mse))

    def check(self) -> None:
        """Do nothing, because `note` has already checked."""

    def read(self, metrics: dict[str, Number]) -> dict[str, Number]:
        """Return the metrics as numbers."""
        return {**read_metrics(metrics)}


class DeviceNumbers:
    """Numbers of steps on a GPU: captured steps read them from the device, and no step waits for them."""

    def __init__(self, total_variance: float, device: torch.device):
        self.diverged: str | None = None
        self._limit = _EXPLOSION * total_variance
        # [number of steps done, learning rate, factor of the sparsity penalty, learning rate that does not decay]
        self._now = torch.zeros(4, dtype=torch.float64, device=device)
        self._failure = torch.zeros(3, dtype=torch.float64, device=device)
        largest = [math.inf, torch.finfo(torch.float64).max, self._limit]
        self._largest = torch.tensor(largest, dtype=torch.float64, device=device)
        self._set: dict[int, float] = {}
        self.watch: DivergenceWatch | None = DivergenceWatch(self._now, self._failure, self._limit)

    @property
    def lr(self) -> Float[Tensor, ""]:
        """The step's learning rate."""
        return self._now[1].float()

    @property
    def undecayed_lr(self) -> Float[Tensor, ""]:
        """The step's learning rate for parameters whose rate does not fall at the end of the run."""
        return self._now[3].float()

    @property
    def sparsity_scale(self) -> Float[Tensor, ""]:
        """The factor of the sparsity penalty."""
        return self._now[2]

    @property
    def step_number(self) -> Float[Tensor, ""] | None:
        """The steps done before this one."""
        return self._now[0] - 1

    def set(self, steps_done: int, lr: float, sparsity_scale: float, undecayed_lr: float) -> None:
        """Set the numbers of the next step that have changed, except its own number, which `begin` counts."""
        for place, number in ((1, lr), (2, sparsity_scale), (3, undecayed_lr)):
            if self._set.get(place) != number:
                self._now[place].fill_(number)
                self._set[place] = number

    def resume(self, steps_done: int) -> None:
        """Continue after a number of steps."""
        self._now[0].fill_(steps_done)

    def begin(self) -> None:
        """Count a step; this and what follows may be captured."""
        self._now[0].add_(1)

    def note(self, loss: Number, mse: Number) -> None:
        """Record the first step that diverged on the device, until `check` reads it."""
        loss, mse = (
            number.double() if isinstance(number, Tensor) else self._failure.new_full((), number)
            for number in (loss, mse)
        )
        found = torch.stack([self._now[0], loss, mse])
        # What is not a number is not below a limit.
        sound = (found.abs() <= self._largest).all()
        torch.where(sound | (self._failure[0] > 0), self._failure, found, out=self._failure)

    def check(self) -> None:
        """Set `diverged` if a step has diverged; this waits for the device."""
        step, loss, mse = self._failure.tolist()
        if step and self.diverged is None:
            self.diverged = _failure(int(step), loss, mse)

    def read(self, metrics: dict[str, Number]) -> dict[str, Number]:
        """Return the metrics, still on the device."""
        return metrics


def _failure(step: int, loss: float, mse: float) -> str:
    return f"loss {loss} and mse {mse} at step {step}"
