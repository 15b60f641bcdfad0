"""Data-parallel training of one SAE: each rank takes its slice of every batch, and gradients are averaged."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..architectures.contract import StepOutput
from ..kernels.gradient import whole
from .collectives import RankCollectives


class DataParallel(RankCollectives):
    """The ranks' slices have equal sizes, so that the mean of their gradients is the whole batch's gradient."""

    def rows(self, n_rows: int) -> int:
        """Return the rows of the whole batch."""
        return n_rows * self.ranks.n

    def mean(self, number: Tensor) -> Tensor:
        """Return the mean over ranks."""
        number = number.clone()
        self.ranks.add(number)
        return number / self.ranks.n

    def combine(self, output: StepOutput) -> StepOutput:
        """Return the mean of the ranks' gradients and numbers, and which latents fired on any rank."""
        numbers = {"loss": output.loss, "mse": output.mse, "l0": output.l0, **output.terms}
        device = output.fired.device
        packed = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers.values()])
        fired = output.fired.to(torch.uint8)
        gradients = {name: whole(gradient).contiguous() for name, gradient in output.gradients.items()}
        self.ranks.add(packed, *gradients.values())
        self.ranks.greatest(fired)
        packed /= self.ranks.n
        for gradient in gradients.values():
            gradient /= self.ranks.n
        loss, mse, l0, *terms = packed.unbind() if device.type == "cuda" else packed.tolist()
        return replace(
            output,
            gradients=gradients,
            fired=fired.bool(),
            loss=loss,
            mse=mse,
            l0=l0,
            terms=dict(zip(output.terms, terms, strict=True)),
        )
