"""TopK's steps as a few fused kernels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..architectures.contract import SINGLE_PROCESS, Batch, Collectives, Number
from .host_polls import DEAD_STATE, DeadLatentPoll
from .step_numbers import StepNumbers

if TYPE_CHECKING:
    from ..kernels.triton.topk_step import TopKStep


class FusedStep:
    """One SAE of `d_sae` latents that is trained by a `TopKStep`, which owns its weights and moments."""

    def __init__(self, step: TopKStep, d_sae: int, numbers: StepNumbers, across: Collectives = SINGLE_PROCESS):
        self.step = step
        self.d_sae = d_sae
        self.numbers = numbers
        self.across = across
        self.parameters = step.parameters()
        self.exp_avg, self.exp_avg_sq = step.moments()
        self.tokens_since_fired = step.tokens_since_fired
        self.compute_dtype: torch.dtype = step.W_enc.shadow.dtype
        has_auxk = step.options.aux_coefficient > 0 and step.options.k_aux > 0
        self.dead = DeadLatentPoll(step.options.dead_after_tokens) if has_auxk else None

    def needed(self, batch: Batch) -> Batch:
        """Return the rows in the compute dtype, the only part of the batch that the kernels read."""
        return Batch(batch.x_compute, batch.x_compute)

    def before(self, batch: Batch, steps_done: int, lr: float) -> Hashable | None:
        """Set the learning rate, poll the device if a poll is due, and return what determines the step's shapes."""
        self.step.set_lr(lr)
        n_rows = self.across.rows(len(batch.x))
        n_dead = self.dead.before(steps_done, n_rows, self.tokens_since_fired, self.across) if self.dead else 0
        return n_rows, n_dead

    def take(self, batch: Batch, steps_done: int) -> dict[str, Number]:
        """Take a step, with AuxK for as many dead latents as the last poll allows; return its metrics."""
        room = self.dead.n_dead if self.dead else 0
        found = self.step(batch.x_compute, room, self.numbers.watch)
        if self.numbers.watch is None:
            self.numbers.note(found.loss, found.mse)
        metrics: dict[str, Number] = {"loss": found.loss, "mse_loss": found.mse_loss}
        if room:
            metrics["auxk_loss"] = found.auxk_loss
        if self.step.grad_norm is not None:
            metrics["grad_norm"] = self.step.grad_norm
        return {
            **metrics,
            "explained_variance": found.explained_variance,
            "l0": found.l0,
            "dead_fraction": found.n_dead / self.d_sae,
        }

    def refresh(self) -> None:
        """Update the copies of the weights that products read."""
        self.step.refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later steps depend on."""
        # A bound on the dead latents of each rank does not hold for another number of ranks.
        polled = {} if self.dead is None or self.across.shares_latents else {DEAD_STATE: self.dead.state()}
        return self.step.state_dict() | polled

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state."""
        if self.dead is not None:
            self.dead.load(state.get(DEAD_STATE))
        self.step.load_state_dict(state)
