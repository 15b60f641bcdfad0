"""TopK's whole step of fused kernels inside the trainer: when it is to be had, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..architectures.base import Architecture
from ..architectures.contract import Number, Parameters
from ..architectures.topk import TopK
from ..kernels.backend import Backend
from ..kernels.fused_state import TopKOptions

if TYPE_CHECKING:
    from ..kernels.triton.topk_step import TopKStep


class FusedStep:
    """A `TopKStep` that tells what a trainer's step does."""

    def __init__(self, step: TopKStep):
        self.step = step
        self.has_auxk = step.options.aux_coefficient > 0 and step.options.k_aux > 0

    @classmethod
    def of(
        cls,
        kernels: Backend,
        architecture: Architecture,
        parameters: Parameters,
        total_variance: float,
        dead_after_tokens: int,
        compute_dtype: torch.dtype,
    ) -> FusedStep | None:
        """Return the fused step, where kernels and architecture have one."""
        if kernels.fixed_shapes is None or type(architecture) is not TopK or not architecture.centred:
            return None
        if not architecture.unit_norm_decoder:
            return None
        config, (beta1, beta2) = architecture.config, architecture.adam_betas
        options = TopKOptions(
            k=int(config.k or 0),
            total_variance=total_variance,
            beta1=beta1,
            beta2=beta2,
            eps=architecture.eps,
            max_norm=config.clip_grad_norm,
            aux_coefficient=architecture.aux_coefficient,
            k_aux=architecture.k_aux,
            dead_after_tokens=dead_after_tokens,
        )
        return cls(kernels.fixed_shapes.topk_step(parameters, options, compute_dtype))

    def __call__(self, x_compute: Tensor, n_dead: int) -> dict[str, Number]:
        """Take a step, with AuxK for at most `n_dead` dead latents; return its numbers, on the device."""
        mse, l0, auxiliary = self.step(x_compute, n_dead).double().unbind()
        terms: dict[str, Number] = {"mse_loss": mse / self.step.options.total_variance}
        if n_dead and self.has_auxk:
            terms["auxk_loss"] = auxiliary
        if self.step.grad_norm is not None:
            terms["grad_norm"] = self.step.grad_norm
        return {"loss": terms["mse_loss"] + auxiliary, "mse": mse, "l0": l0, **terms}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the step's state, by the trainer's names."""
        return self.step.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a saved state."""
        self.step.load_state_dict(state)
