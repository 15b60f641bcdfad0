"""Train one SAE of a sweep: its parameters, optimizer, schedules and dead-latent counters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..shared.sae import Sae
from .architectures import make_architecture
from .architectures.base import Batch, Number, Parameters, StepInput
from .config import SaeConfig
from .normalization import Normalization
from .optimizer import Optimizer
from .parallel.across import ALONE, Across
from .resampling import resample_dead_latents
from .schedule import lr_factor, sparsity_factor
from .whole_step import WholeStep

_EXPLOSION = 1e4
_MOST_DEAD_AFTER_TOKENS = 10_000_000


class Schedule(NamedTuple):
    """How long a run is, and how its learning rates rise and fall."""

    n_steps: int
    batch_size: int
    warmup_steps: int
    decay_fraction: float


def read_metrics(metrics: Mapping[str, Number]) -> dict[str, float]:
    """Return the numbers, those on a device in one transfer."""
    names = [name for name, value in metrics.items() if isinstance(value, Tensor)]
    read = torch.stack([torch.as_tensor(metrics[name]).double() for name in names]).tolist() if names else []
    there = dict(zip(names, read, strict=True))
    return {name: there[name] if name in there else float(value) for name, value in metrics.items()}


class SaeTrainer:
    """One SAE in training. Nothing in it depends on the other SAEs of its sweep.

    `diverged` says why training stopped early, if it did. On a GPU a step does not wait for the device: the metrics
    are read, and divergence is noticed, when the run asks for them by `read_metrics` and `check`. A TopK SAE takes
    whole steps of fused kernels where the kernels have them, unless `fuse` is false.
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
        fuse: bool = True,
        across: Across = ALONE,
    ):
        self.config = config
        self.name = config.name or config.architecture
        self.device = torch.device(device)
        self.normalization = normalization.to(self.device)
        self.schedule = schedule
        self.kernels = kernels
        d_out = len(normalization.target.mean) if normalization.target else d_in
        self.across = across
        self.architecture = across.shard(make_architecture(config, d_in, d_out))
        initial = self.architecture.initial_parameters(torch.Generator().manual_seed(config.seed))
        self.parameters = {name: tensor.to(device) for name, tensor in initial.items()}
        self.buffers = {name: tensor.to(device) for name, tensor in self.architecture.initial_buffers().items()}
        self.optimizer = Optimizer(self.parameters, self.architecture, config.clip_grad_norm, across)
        self.W_enc_compute = self.parameters["W_enc"].to(compute_dtype)
        self.tokens_since_fired = torch.zeros(len(self.W_enc_compute), dtype=torch.int64, device=device)
        n_tokens = schedule.n_steps * schedule.batch_size
        self.dead_after_tokens = config.dead_after_tokens or min(_MOST_DEAD_AFTER_TOKENS, max(n_tokens // 10, 1))
        warmup = config.sparsity_warmup_steps
        self.sparsity_warmup_steps = schedule.n_steps // 20 if warmup is None else warmup
        self.averages = {name: tensor.clone() for name, tensor in self.parameters.items()} if config.ema_decay else {}
        self.steps_done = 0
        self.diverged: str | None = None
        self._failure = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.whole_step: WholeStep | None = None
        if fuse and across is ALONE:
            self._fuse(kernels, compute_dtype)

    def _fuse(self, kernels: Any, compute_dtype: torch.dtype) -> None:
        """Let parameters, moments and counters be those of the fused step, where there is one."""
        if not self.optimizer.unit_norm_decoder:
            return
        self.whole_step = WholeStep.of(
            kernels,
            self.architecture,
            self.parameters,
            self.normalization.total_variance,
            self.dead_after_tokens,
            compute_dtype,
        )
        if self.whole_step is None:
            return
        step = self.whole_step.step
        self.parameters = self.optimizer.parameters = step.parameters()
        self.optimizer.exp_avg, self.optimizer.exp_avg_sq = step.moments()
        self.optimizer.steps = step.steps
        self.W_enc_compute = step.W_enc.shadow
        self.tokens_since_fired = step.tokens_since_fired

    @torch.no_grad()
    def step(self, batch: Batch) -> dict[str, Number]:
        """Train on one batch and return the step's metrics.

        On divergence a CPU's step changes nothing and sets `diverged`; a GPU's leaves it to `check`.
        """
        schedule, step = self.schedule, self.steps_done
        lr = self.architecture.lr * lr_factor(step, schedule.n_steps, schedule.warmup_steps, schedule.decay_fraction)
        dead = self.tokens_since_fired >= self.dead_after_tokens
        n_dead = self.across.over_latents(torch.count_nonzero(dead).double())
        taken = self._step_whole(batch, lr) if self.whole_step else self._step_by_ops(batch, lr, dead, n_dead)
        mse, l0 = taken.pop("mse"), taken.pop("l0")
        if self.diverged is not None:
            return {"loss": taken["loss"], "lr": lr}
        self.steps_done += 1
        self._resample(batch)
        self._average()
        metrics = taken | {
            "explained_variance": 1 - mse / self.normalization.total_variance,
            "l0": l0,
            "dead_fraction": n_dead / self.config.d_sae,
            "lr": lr,
        }
        return metrics if self.device.type == "cuda" else {**read_metrics(metrics)}

    def _step_whole(self, batch: Batch, lr: float) -> dict[str, Number]:
        assert self.whole_step is not None
        taken = self.whole_step(batch, lr, self.steps_done)
        self._note_failure(taken["loss"], taken["mse"])
        return taken

    def _step_by_ops(self, batch: Batch, lr: float, dead: Tensor, n_dead: Tensor) -> dict[str, Number]:
        # The host asks for no count while too few tokens have been seen for any latent to be dead.
        can_be_dead = self.steps_done * max(self.schedule.batch_size, len(batch.x)) >= self.dead_after_tokens
        any_dead = self.architecture.revives_dead and can_be_dead and bool(n_dead > 0)
        output = self.architecture.step(
            self.parameters,
            batch,
            StepInput(
                kernels=self.kernels,
                W_enc_compute=self.W_enc_compute,
                total_variance=self.normalization.total_variance,
                dead=dead if any_dead else None,
                sparsity_scale=sparsity_factor(self.steps_done, self.sparsity_warmup_steps),
                buffers=self.buffers,
                steps_done=self.steps_done,
                across=self.across,
            ),
        )
        output = self.across.combine(output)
        taken: dict[str, Number] = {"loss": output.loss, "mse": output.mse, "l0": output.l0, **output.terms}
        self._note_failure(output.loss, output.mse)
        if self.diverged is not None:
            return taken
        grad_norm = self.optimizer.step(output.gradients, lr)
        self.W_enc_compute.copy_(self.parameters["W_enc"])
        self.tokens_since_fired += self.across.rows(len(batch.x))
        self.tokens_since_fired.masked_fill_(output.fired, 0)
        if grad_norm is not None:
            taken["grad_norm"] = grad_norm
        return taken

    def _note_failure(self, loss: Number, mse: Number) -> None:
        """Keep the first step that diverged on the device; on a CPU, look at once."""
        limit = _EXPLOSION * self.normalization.total_variance
        if self.device.type != "cuda":
            if not math.isfinite(loss) or mse > limit:
                self.diverged = _failure(self.steps_done + 1, float(loss), float(mse))
            return
        loss, mse, step = (
            number.double() if isinstance(number, Tensor) else self._failure.new_full((), number)
            for number in (loss, mse, self.steps_done + 1)
        )
        bad = ~(torch.isfinite(loss) & (mse <= limit)) & (self._failure[0] == 0)
        self._failure = torch.where(bad, torch.stack([step, loss, mse]), self._failure)

    def check(self) -> None:
        """Set `diverged` if a step has diverged; this waits for the device."""
        step, loss, mse = self._failure.tolist()
        if step and self.diverged is None:
            self.diverged = _failure(int(step), loss, mse)

    def _resample(self, batch: Batch) -> None:
        """Start dead latents anew where it is time to: at intervals in the first half of the run."""
        every, done = self.config.resample_every_tokens, self.steps_done
        dead = self.tokens_since_fired >= self.dead_after_tokens
        if not every or 2 * done > self.schedule.n_steps or not bool(dead.any()):
            return
        if done * self.schedule.batch_size // every == (done - 1) * self.schedule.batch_size // every:
            return
        sae = self.architecture.to_sae(self.parameters, self.buffers, self.normalization.identity(), {})
        x = self.across.all_values(batch.x)
        target = x if batch.target is None else self.across.all_values(batch.target)
        initial = self.architecture.initial_parameters(torch.Generator().manual_seed(self.config.seed))
        generator = torch.Generator().manual_seed((self.config.seed << 32) + done)
        resample_dead_latents(self.optimizer, initial, dead, x, target, sae(x) - target, generator)
        self._refresh()
        self.tokens_since_fired[dead] = 0

    def _average(self) -> None:
        """Move the running means of the weights, at first faster, so that the initial weights are soon forgotten."""
        done = self.steps_done
        for name, mean in self.averages.items():
            decay = min(self.config.ema_decay or 0.0, (1 + done) / (10 + done))
            mean.lerp_(self.parameters[name].to(mean.dtype), 1 - decay)

    def _refresh(self) -> None:
        """Copy the weights to where products read them, after something other than a step has changed them."""
        self.W_enc_compute.copy_(self.parameters["W_enc"])
        if self.whole_step is not None:
            self.whole_step.step.refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a later step depends on; names are the same on every path, so one can go on from another."""
        averages = {f"averages.{name}": tensor for name, tensor in self.averages.items()}
        if self.whole_step is not None:
            return {**self.whole_step.state_dict(), **averages, "steps_done": torch.tensor(self.steps_done)}
        return {
            **averages,
            **{f"parameters.{name}": tensor for name, tensor in self.parameters.items()},
            **{f"buffers.{name}": tensor for name, tensor in self.buffers.items()},
            **{f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_dict().items()},
            "tokens_since_fired": self.tokens_since_fired,
            "steps_done": torch.tensor(self.steps_done),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a saved state."""
        self.steps_done = int(state["steps_done"])
        for name, tensor in self.averages.items():
            tensor.copy_(state[f"averages.{name}"])
        if self.whole_step is not None:
            self.whole_step.load_state_dict(state)
            return
        for name, tensor in self.parameters.items():
            tensor.copy_(state[f"parameters.{name}"])
        for name, tensor in self.buffers.items():
            tensor.copy_(state[f"buffers.{name}"])
        prefix = "optimizer."
        self.optimizer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self._refresh()

    @property
    def trained_parameters(self) -> Parameters:
        """Return the parameters that are saved: their running means where there are any."""
        return self.averages or self.parameters

    def to_sae(self, metadata: dict[str, Any], parameters: Mapping[str, Tensor] | None = None) -> Sae:
        """Return the SAE as it is now, for inference on raw activations; `parameters` are all ranks' joined."""
        parameters = dict(parameters or self.trained_parameters)
        buffers = {name: tensor.to(parameters["W_enc"].device) for name, tensor in self.buffers.items()}
        normalization = self.normalization.to(parameters["W_enc"].device)
        return self.architecture.to_sae(parameters, buffers, normalization, metadata)


def _failure(step: int, loss: float, mse: float) -> str:
    return f"loss {loss} and mse {mse} at step {step}"
