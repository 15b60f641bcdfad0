"""Steps taken operation by operation: the architecture's loss and gradients, and then the optimizer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures.base import Architecture
from ..architectures.contract import Batch, Buffers, Collectives, Number, Parameters, StepInput
from ..kernels.backend import Backend
from .host_polls import Polls
from .l0_control import L0Control
from .optimizer import Optimizer
from .step_numbers import StepNumbers

_OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class OpByOpParts:
    """The parts of an SAE's steps besides its weights. For `copies_decoder`, see `StepInput.W_dec_compute`."""

    architecture: Architecture
    kernels: Backend
    total_variance: float
    dead_after_tokens: int
    numbers: StepNumbers
    polls: Polls
    across: Collectives
    compute_dtype: torch.dtype
    l0_control: L0Control | None
    copies_decoder: bool


class OpByOp:
    """One SAE whose steps are operations of a backend, on any device, on one rank or `across` several."""

    def __init__(self, parts: OpByOpParts, parameters: Parameters, buffers: Buffers):
        self.parts = parts
        self.parameters = parameters
        self.buffers = buffers
        self.compute_dtype = parts.compute_dtype
        self.optimizer = Optimizer(
            parameters, parts.architecture, parts.architecture.config.clip_grad_norm, parts.across
        )
        self.exp_avg, self.exp_avg_sq = self.optimizer.exp_avg, self.optimizer.exp_avg_sq
        encoder = "W_enc" if "W_enc" in parameters else "W_dec"  # a decoder that encodes, too
        self.W_enc_compute = parameters[encoder].to(parts.compute_dtype, copy=True)
        self.W_dec_compute: Tensor | None = None
        self.optimizer.copies = {encoder: self.W_enc_compute}
        if encoder == "W_dec":
            self.W_dec_compute = self.W_enc_compute if parts.copies_decoder else None
        elif parts.copies_decoder:
            self.W_dec_compute = parameters["W_dec"].to(parts.compute_dtype)
            if self.W_dec_compute is not parameters["W_dec"]:
                self.optimizer.copies["W_dec"] = self.W_dec_compute
        self.tokens_since_fired = torch.zeros(
            len(self.W_enc_compute), dtype=torch.int64, device=self.W_enc_compute.device
        )

    def needed(self, batch: Batch) -> Batch:
        """Return the whole batch, because an architecture may read all of it."""
        return batch

    def before(self, batch: Batch, steps_done: int, lr: float) -> Hashable | None:
        """Poll the device if a poll is due, and return what determines the step's launches."""
        return self.parts.polls.before(steps_done, len(batch.x), self.tokens_since_fired)

    def take(self, batch: Batch, steps_done: int) -> dict[str, Number]:
        """Take a step and return its metrics."""
        parts, numbers, polls, control = self.parts, self.parts.numbers, self.parts.polls, self.parts.l0_control
        dead = self.tokens_since_fired >= parts.dead_after_tokens
        n_dead = parts.across.over_latents(torch.count_nonzero(dead).double())
        output = parts.architecture.step(
            self.parameters,
            batch,
            StepInput(
                kernels=parts.kernels,
                W_enc_compute=self.W_enc_compute,
                total_variance=parts.total_variance,
                W_dec_compute=self.W_dec_compute,
                dead=dead if polls.any_dead(steps_done, len(batch.x), n_dead) else None,
                sparsity_scale=numbers.sparsity_scale * (control.factor if control else 1.0),
                buffers=self.buffers,
                steps_done=steps_done,
                step_number=numbers.step_number,
                across=parts.across,
                room=polls.room,
                n_dead=polls.room_for_dead(dead),
            ),
        )
        output = parts.across.combine(output)
        taken: dict[str, Number] = {"loss": output.loss, **output.terms}
        numbers.note(output.loss, output.mse)
        if numbers.diverged is not None:
            return taken
        failed = polls.room.failed if polls.room else None
        grad_norm = self.optimizer.step(output.gradients, numbers.lr, failed, numbers.undecayed_lr)
        if control is not None:
            control.update(output.l0, failed)
            taken["penalty_factor"] = control.factor.clone()
        self.tokens_since_fired += parts.across.rows(len(batch.x))
        self.tokens_since_fired.masked_fill_(output.fired, 0)
        if grad_norm is not None:
            taken["grad_norm"] = grad_norm
        return {
            **taken,
            **polls.metrics(),
            "explained_variance": 1 - output.mse / parts.total_variance,
            "l0": output.l0,
            "dead_fraction": n_dead / parts.architecture.d_sae,
        }

    def refresh(self) -> None:
        """Update the copies of the weights that products read."""
        self.optimizer.copy()

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later steps depend on."""
        control = self.parts.l0_control
        return {
            **self.parts.polls.state_dict(),
            **({"l0_control": control.state} if control else {}),
            **{f"parameters.{name}": tensor for name, tensor in self.parameters.items()},
            **{f"buffers.{name}": tensor for name, tensor in self.buffers.items()},
            **{f"{_OPTIMIZER}{name}": tensor for name, tensor in self.optimizer.state_dict().items()},
            "tokens_since_fired": self.tokens_since_fired,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state."""
        self.parts.polls.load_state_dict(state)
        if self.parts.l0_control is not None:
            self.parts.l0_control.state.copy_(state["l0_control"])
        for prefix, tensors in (("parameters.", self.parameters), ("buffers.", self.buffers)):
            for name, tensor in tensors.items():
                tensor.copy_(state[prefix + name])
        self.optimizer.load_state_dict(
            {name.removeprefix(_OPTIMIZER): tensor for name, tensor in state.items() if name.startswith(_OPTIMIZER)}
        )
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.refresh()
