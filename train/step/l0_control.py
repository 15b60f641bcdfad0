"""Reach a target L0: a controller of the factor by which a sparsity penalty is multiplied."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..architectures.contract import L0Target, Number

DAMPING = 1.0
APPROACH = 0.25
_LEAST_L0 = 0.1


class L0Control:
    """A proportional-integral controller: the logarithm of the factor follows that of L0 over its target.

    The target is approached geometrically from the L0 of the first step, over the first quarter of the run: a penalty
    that grew for as long as half of all latents fire would be far too large once they no longer do. Over the whole run,
    whatever its length, the integral grows by the target's gain for an L0 that is e times what it should be, and by
    no more for larger ones. It stays above the logarithm of `least_factor`. On a GPU nothing waits for the device:
    `state` holds the integral, the factor, the first L0, and the number of steps.
    """

    def __init__(self, target: L0Target, n_steps: int, device: torch.device):
        self.target = target
        self._n_steps, self._n_approach = n_steps, max(1.0, APPROACH * n_steps)
        first = [math.log(target.first_factor), target.first_factor, 0.0, 0.0]
        least = min(target.least_factor, target.first_factor)
        self._least = math.log(least) if least > 0 else -math.inf
        self.state = torch.tensor(first, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, target: L0Target | None, n_steps: int, device: torch.device) -> L0Control | None:
        """Return a controller, where there is a target."""
        return None if target is None else cls(target, n_steps, device)

    @property
    def factor(self) -> Tensor:
        """Return the penalty's factor, a number on the device."""
        return self.state[1]

    def update(self, l0: Number, skip: Tensor | None = None) -> None:
        """Set the factor of the next step by a step's L0.

        Where `skip`, on the device, is 1, the step changed nothing and neither does this.
        """
        l0 = torch.as_tensor(l0, dtype=torch.float64, device=self.state.device).clamp_min(_LEAST_L0)
        done = self.state[3] + 1
        share = (done / self._n_approach).clamp(max=1)
        first = torch.where(self.state[2] > 0, self.state[2], l0)
        reference = (first / self.target.l0).log().clamp_min(0) * (1 - share)
        error = ((l0 / self.target.l0).log() - reference).clamp(-1, 1)
        gain = self.target.gain + (self.target.last_gain - self.target.gain) * (done / self._n_steps).clamp(max=1)
        integral = (self.state[0] + gain / self._n_steps * error).clamp_min(self._least)
        new = torch.stack([integral, (integral + DAMPING * error).exp(), first, done])
        self.state.copy_(new if skip is None else torch.where(skip > 0, self.state, new))
