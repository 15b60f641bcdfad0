"""TopK's whole step of fused kernels inside the trainer: when it is to be had, and when AuxK joins it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .architectures.base import Architecture, Batch, Number, Parameters
from .architectures.topk import TopK

if TYPE_CHECKING:
    from .kernels.topk_step import TopKStep

_STEPS_WITH_DEAD = 16


class WholeStep:
    """A `TopKStep` and the steps at which it must look whether latents are dead.

    AuxK costs a second selection, so steps go without it until a latent can be dead: from the longest silence of
    any latent follows how many steps no latent can be. Looking is the only wait for the device, and where it
    falls is saved, so that a resumed run looks where the whole one did.
    """

    def __init__(self, step: TopKStep):
        self.step = step
        self.has_auxk = step.options.aux_coefficient > 0 and step.options.k_aux > 0
        self._auxiliary = False
        self._look_at = 0

    @classmethod
    def of(
        cls,
        kernels: Any,
        architecture: Architecture,
        parameters: Parameters,
        total_variance: float,
        dead_after_tokens: int,
        compute_dtype: torch.dtype,
    ) -> WholeStep | None:
        """Return the fused step, where kernels and architecture have one."""
        free_norms = architecture.config.unit_norm_decoder is False
        if not hasattr(kernels, "TopKStep") or type(architecture) is not TopK or free_norms:
            return None
        config, (beta1, beta2) = architecture.config, architecture.adam_betas
        options = kernels.TopKOptions(
            k=config.k,
            total_variance=total_variance,
            beta1=beta1,
            beta2=beta2,
            eps=architecture.eps,
            max_norm=config.clip_grad_norm,
            aux_coefficient=config.aux_coefficient,
            k_aux=config.k_aux or max(1, architecture.d_in // 2),
            dead_after_tokens=dead_after_tokens,
        )
        return cls(kernels.TopKStep(parameters, options, compute_dtype))

    def __call__(self, batch: Batch, lr: float, steps_done: int) -> dict[str, Number]:
        """Take a step; return its numbers, on the device."""
        self._look(len(batch.x), steps_done)
        self.step.set_lr(lr)
        mse, l0, auxiliary = self.step(batch.x_compute, self._auxiliary).double().unbind()
        terms: dict[str, Number] = {"mse_loss": mse / self.step.options.total_variance}
        if self._auxiliary:
            terms["auxk_loss"] = auxiliary
        if self.step.grad_norm is not None:
            terms["grad_norm"] = self.step.grad_norm
        return {"loss": terms["mse_loss"] + auxiliary, "mse": mse, "l0": l0, **terms}

    def _look(self, batch_size: int, steps_done: int) -> None:
        if not self.has_auxk or steps_done < self._look_at:
            return
        left = self.step.options.dead_after_tokens - int(self.step.tokens_since_fired.max())
        self._auxiliary = left <= 0
        self._look_at = steps_done + (_STEPS_WITH_DEAD if self._auxiliary else -(-left // batch_size))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the step's state, by the trainer's names, and where the next look falls."""
        return {**self.step.state_dict(), "auxk": torch.tensor([int(self._auxiliary), self._look_at])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a saved state; one that another path saved is looked at first."""
        self.step.load_state_dict(state)
        auxiliary, self._look_at = state["auxk"].tolist() if "auxk" in state else (0, 0)
        self._auxiliary = bool(auxiliary)
