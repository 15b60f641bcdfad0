"""Train one SAE of a sweep: its parameters, optimizer, schedules and dead-latent counters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..shared.sae import Sae
from .architectures import make_architecture
from .architectures.base import Batch, StepInput
from .config import SaeConfig
from .normalization import Normalization
from .optimizer import Optimizer
from .resampling import resample_dead_latents
from .schedule import lr_factor, sparsity_factor

_EXPLOSION = 1e4
_MOST_DEAD_AFTER_TOKENS = 10_000_000


class Schedule(NamedTuple):
    """How long a run is, and how its learning rates rise and fall."""

    n_steps: int
    batch_size: int
    warmup_steps: int
    decay_fraction: float


class SaeTrainer:
    """One SAE in training. Nothing in it depends on the other SAEs of its sweep.

    `diverged` says why training stopped early, if it did.
    """

    def __init__(
        self,
        config: SaeConfig,
        d_in: int,
        normalization: Normalization,
        schedule: Schedule,
        kernels: Any,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
    ):
        self.config = config
        self.name = config.name or config.architecture
        self.normalization = normalization
        self.schedule = schedule
        self.kernels = kernels
        d_out = len(normalization.target.mean) if normalization.target else d_in
        self.architecture = make_architecture(config, d_in, d_out)
        initial = self.architecture.initial_parameters(torch.Generator().manual_seed(config.seed))
        self.parameters = {name: tensor.to(device) for name, tensor in initial.items()}
        self.buffers = {name: tensor.to(device) for name, tensor in self.architecture.initial_buffers().items()}
        self.optimizer = Optimizer(self.parameters, self.architecture, config.clip_grad_norm)
        self.W_enc_compute = self.parameters["W_enc"].to(compute_dtype)
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        n_tokens = schedule.n_steps * schedule.batch_size
        self.dead_after_tokens = config.dead_after_tokens or min(_MOST_DEAD_AFTER_TOKENS, max(n_tokens // 10, 1))
        warmup = config.sparsity_warmup_steps
        self.sparsity_warmup_steps = schedule.n_steps // 20 if warmup is None else warmup
        self.steps_done = 0
        self.diverged: str | None = None

    @torch.no_grad()
    def step(self, batch: Batch) -> dict[str, float]:
        """Train on one batch and return the step's metrics; on divergence, change nothing and set `diverged`."""
        schedule, step = self.schedule, self.steps_done
        lr = self.architecture.lr * lr_factor(step, schedule.n_steps, schedule.warmup_steps, schedule.decay_fraction)
        dead = self.tokens_since_fired >= self.dead_after_tokens
        n_dead = int(dead.sum())
        output = self.architecture.step(
            self.parameters,
            batch,
            StepInput(
                kernels=self.kernels,
                W_enc_compute=self.W_enc_compute,
                total_variance=self.normalization.total_variance,
                dead=dead if n_dead else None,
                sparsity_scale=sparsity_factor(step, self.sparsity_warmup_steps),
                buffers=self.buffers,
            ),
        )
        if not math.isfinite(output.loss) or output.mse > _EXPLOSION * self.normalization.total_variance:
            self.diverged = f"loss {output.loss} and mse {output.mse} at step {step + 1}"
            return {"loss": output.loss, "lr": lr}
        grad_norm = self.optimizer.step(output.gradients, lr)
        self.W_enc_compute.copy_(self.parameters["W_enc"])
        self.tokens_since_fired += len(batch.x)
        self.tokens_since_fired[output.fired] = 0
        self.steps_done += 1
        self._resample(batch)
        metrics = {"loss": output.loss, **output.terms}
        if grad_norm is not None:
            metrics["grad_norm"] = grad_norm
        return metrics | {
            "explained_variance": 1 - output.mse / self.normalization.total_variance,
            "l0": output.l0,
            "dead_fraction": n_dead / self.config.d_sae,
            "lr": lr,
        }

    def _resample(self, batch: Batch) -> None:
        """Start dead latents anew where it is time to: at intervals in the first half of the run."""
        every, done = self.config.resample_every_tokens, self.steps_done
        dead = self.tokens_since_fired >= self.dead_after_tokens
        if not every or 2 * done > self.schedule.n_steps or not bool(dead.any()):
            return
        if done * self.schedule.batch_size // every == (done - 1) * self.schedule.batch_size // every:
            return
        sae = self.architecture.to_sae(self.parameters, self.buffers, self.normalization.identity(), {})
        target = batch.x if batch.target is None else batch.target
        initial = self.architecture.initial_parameters(torch.Generator().manual_seed(self.config.seed))
        generator = torch.Generator().manual_seed((self.config.seed << 32) + done)
        resample_dead_latents(self.optimizer, initial, dead, batch.x, target, sae(batch.x) - target, generator)
        self.W_enc_compute.copy_(self.parameters["W_enc"])
        self.tokens_since_fired[dead] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a later step depends on."""
        return {
            **{f"parameters.{name}": tensor for name, tensor in self.parameters.items()},
            **{f"buffers.{name}": tensor for name, tensor in self.buffers.items()},
            **{f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_dict().items()},
            "tokens_since_fired": self.tokens_since_fired,
            "steps_done": torch.tensor(self.steps_done),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a saved state."""
        for name, tensor in self.parameters.items():
            tensor.copy_(state[f"parameters.{name}"])
        for name, tensor in self.buffers.items():
            tensor.copy_(state[f"buffers.{name}"])
        prefix = "optimizer."
        self.optimizer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.steps_done = int(state["steps_done"])
        self.W_enc_compute.copy_(self.parameters["W_enc"])

    def to_sae(self, metadata: dict[str, Any]) -> Sae:
        """Return the SAE as it is now, for inference on raw activations."""
        return self.architecture.to_sae(self.parameters, self.buffers, self.normalization, metadata)
