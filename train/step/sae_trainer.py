"""Train one SAE of a sweep: its parameters, optimizer, schedules and dead-latent counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...shared.sae import Sae
from ..architectures import make_architecture
from ..architectures.base import Architecture
from ..architectures.contract import SINGLE_PROCESS, Batch, Collectives, Number, Parameters
from ..config import SaeConfig
from ..kernels.backend import Backend
from ..stream.normalization import Normalization
from .fused_step import FusedStep
from .host_polls import Polled, Unpolled
from .l0_control import L0Control
from .op_by_op import OpByOp, OpByOpParts
from .resampling import resample_dead_latents
from .schedule import lr_factor, sparsity_factor
from .step_graphs import Capture, StepGraphs
from .step_mode import StepMode
from .step_numbers import DeviceNumbers, HostNumbers, StepNumbers

_MOST_DEAD_AFTER_TOKENS = 10_000_000


class Schedule(NamedTuple):
    """How long a run is, and how its learning rates rise and fall.

    If a run was continued to more steps, `earlier_n_steps` holds its earlier lengths. Its learning rate at a step is
    that of a run with the length that it had at that step; everything else that depends on the length uses the first
    one.
    """

    n_steps: int
    batch_size: int
    warmup_steps: int
    decay_fraction: float
    lr_decay: Literal["linear", "cosine"] = "linear"
    earlier_n_steps: tuple[int, ...] = ()

    @property
    def n_steps_at_first(self) -> int:
        """Return the steps of the run before it was continued."""
        return self.earlier_n_steps[0] if self.earlier_n_steps else self.n_steps

    def warmup_factor(self, step: int) -> float:
        """Return the factor of a learning rate that grows as all do, and does not fall."""
        return lr_factor(step, self.n_steps, self.warmup_steps, 0.0)

    def lr_factor(self, step: int, config: SaeConfig) -> float:
        """Return the factor of an SAE's peak learning rate at a step; the run's settings are its defaults."""
        fraction = self.decay_fraction if config.decay_fraction is None else config.decay_fraction
        n_steps = next((n for n in self.earlier_n_steps if step < n), self.n_steps)
        return lr_factor(step, n_steps, self.warmup_steps, fraction, config.lr_decay or self.lr_decay)


class SaeTrainer:
    """One SAE in training. Nothing in it depends on the other SAEs of its sweep.

    `mode` owns the weights and takes the steps: TopK's with fused kernels if the backend has them, unless `fuse` is
    false, and others operation by operation. With such a backend, shapes are fixed between polls, and with `capture`,
    steps whose shapes have settled are replayed as graphs. If ranks share the latents, `shard` returns the architecture
    that trains this rank's latents.

    `numbers` defaults to the device's implementation. On a GPU, a step does not wait for the device: metrics are read,
    and divergence is noticed, when the run calls `read_metrics` and `check`. `diverged` says why training stopped
    early, if it did; `seconds` is the duration of the last step by its caller's clock.
    """

    def __init__(
        self,
        *,
        config: SaeConfig,
        d_in: int,
        normalization: Normalization,
        schedule: Schedule,
        kernels: Backend,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        fuse: bool = True,
        across: Collectives = SINGLE_PROCESS,
        shard: Callable[[Architecture], Architecture] | None = None,
        capture: Capture | None = None,
        numbers: StepNumbers | None = None,
    ):
        self.config = config
        self.name = config.name or config.architecture
        self.device = torch.device(device)
        self.normalization = normalization.to(self.device)
        self.schedule = schedule
        self.kernels = kernels
        self.across = across
        d_out = len(normalization.target.mean) if normalization.target else d_in
        whole = make_architecture(config, d_in, d_out)
        self.architecture: Architecture = whole if shard is None else shard(whole)
        n_tokens = schedule.n_steps_at_first * schedule.batch_size
        self.dead_after_tokens = config.dead_after_tokens or min(_MOST_DEAD_AFTER_TOKENS, max(n_tokens // 10, 1))
        self.sparsity_warmup_steps = self.architecture.sparsity_warmup_steps(schedule.n_steps_at_first)
        variance = self.normalization.total_variance
        on_host = self.device.type != "cuda"
        self.numbers = numbers or (HostNumbers(variance) if on_host else DeviceNumbers(variance, self.device))
        self.buffers = {name: tensor.to(device) for name, tensor in self.architecture.initial_buffers().items()}
        self.mode = self._make_mode(compute_dtype, fuse)
        self.parameters = self.mode.parameters
        self.averages = {name: tensor.clone() for name, tensor in self.parameters.items()} if config.ema_decay else {}
        self.steps_done = 0
        self.seconds = 0.0
        self._initialised = False
        captures = self._has_fixed_shapes and self.architecture.declares("capturable")
        self._graphs = StepGraphs(capture if captures else None)

    @property
    def _has_fixed_shapes(self) -> bool:
        return self.kernels.fixed_shapes is not None and self.across is SINGLE_PROCESS

    def _make_mode(self, compute_dtype: torch.dtype, fuse: bool) -> StepMode:
        """Return the mode for this device, backend, architecture and ranks, with initial weights."""
        architecture, variance = self.architecture, self.normalization.total_variance
        initial = architecture.initial_parameters(torch.Generator().manual_seed(self.config.seed))
        initial = architecture.part_here(initial)
        parameters = {name: tensor.to(self.device) for name, tensor in initial.items()}
        parameters = architecture.rotated(parameters, self.normalization)
        fixed = self.kernels.fixed_shapes
        if fixed is not None and fuse and (options := architecture.fused_options(variance, self.dead_after_tokens)):
            step = fixed.topk_step(parameters, options, compute_dtype, self.across)
            return FusedStep(step, architecture.d_sae, self.numbers, self.across)
        if self._has_fixed_shapes:
            polls = Polled(architecture, self.dead_after_tokens, self.device)
        else:
            polls = Unpolled(architecture, self.dead_after_tokens, self.schedule.batch_size, self.across)
        parts = OpByOpParts(
            architecture=architecture,
            kernels=self.kernels,
            total_variance=variance,
            dead_after_tokens=self.dead_after_tokens,
            numbers=self.numbers,
            polls=polls,
            across=self.across,
            compute_dtype=compute_dtype,
            l0_control=L0Control.of(architecture.l0_target, self.schedule.n_steps_at_first, self.device),
            copies_decoder=self.device.type == "cpu",
        )
        return OpByOp(parts, parameters, self.buffers)

    @property
    def diverged(self) -> str | None:
        """Why training stopped early, if it did."""
        return self.numbers.diverged

    @diverged.setter
    def diverged(self, why: str | None) -> None:
        self.numbers.diverged = why

    @torch.no_grad()
    def step(self, batch: Batch) -> dict[str, Number]:
        """Train on one batch and return the step's metrics.

        If training diverges, a step on a CPU changes nothing and sets `diverged`; on a GPU, `check` does this later.
        """
        done = self.steps_done
        if done == 0 and not self._initialised:
            self._start(batch)
        lr = self.architecture.lr * self.schedule.lr_factor(done, self.config)
        undecayed_lr = self.architecture.lr * self.schedule.warmup_factor(done)
        self.numbers.set(done, lr, sparsity_factor(done, self.sparsity_warmup_steps), undecayed_lr)
        key = self.mode.before(batch, done, lr)
        taken = self._graphs(self._take, self.mode.needed(batch), key)
        if self.diverged is not None:
            return {"loss": taken["loss"], "lr": lr}
        self.steps_done += 1
        self._resample(batch)
        self._average()
        return self.numbers.read(taken | {"lr": lr})

    def _take(self, batch: Batch) -> dict[str, Number]:
        """Take a step; all of it may be captured."""
        self.numbers.begin()
        return self.mode.take(batch, self.steps_done)

    def check(self) -> None:
        """Set `diverged` if a step has diverged; on a GPU, this waits for the device."""
        self.numbers.check()

    def _start(self, batch: Batch) -> None:
        """Adapt the initial parameters to the first batch of all ranks, before the first step."""
        if type(self.architecture).start is not Architecture.start:
            x = self.across.all_values(batch.x)
            self.architecture.start(self.parameters, Batch(x, x))
            self.mode.refresh()

    def initialise(self, parameters: Parameters, buffers: Mapping[str, Tensor]) -> None:
        """Start from an SAE's parameters, for normalised rows before rotation, and buffers instead of random ones."""
        parameters = self.architecture.rotated(parameters, self.normalization.to("cpu"))
        for own, given in ((self.parameters, parameters), (self.averages, parameters), (self.buffers, buffers)):
            for name, tensor in own.items():
                tensor.copy_(given[name])
        self.mode.refresh()
        self._initialised = True

    def _resample(self, batch: Batch) -> None:
        """Resample dead latents if it is time to: at intervals in the first half of the run."""
        every, done = self.config.resample_every_tokens, self.steps_done
        if not every or 2 * done > self.schedule.n_steps_at_first:
            return
        if done * self.schedule.batch_size // every == (done - 1) * self.schedule.batch_size // every:
            return
        dead = self.mode.tokens_since_fired >= self.dead_after_tokens
        if not bool(dead.any()):
            return
        sae = self.architecture.to_sae(self.parameters, self.buffers, self.normalization.identity(), {})
        x = self.across.all_values(batch.x)
        target = x if batch.target is None else self.across.all_values(batch.target)
        errors = sae(x) - target
        if batch.row_weights is not None:
            errors *= self.across.all_values(batch.row_weights)
        initial = self.architecture.initial_parameters(torch.Generator().manual_seed(self.config.seed))
        generator = torch.Generator().manual_seed((self.config.seed << 32) + done)
        resample_dead_latents(self.mode, initial, dead, x, target, errors, generator)
        self.mode.refresh()
        self.mode.tokens_since_fired[dead] = 0

    def _average(self) -> None:
        """Update the running means of the weights, faster at first, so that the initial weights are soon forgotten."""
        done = self.steps_done
        for name, mean in self.averages.items():
            decay = min(self.config.ema_decay or 0.0, (1 + done) / (10 + done))
            mean.lerp_(self.parameters[name].to(mean.dtype), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later steps depend on, under the same names in every mode."""
        averages = {f"averages.{name}": tensor for name, tensor in self.averages.items()}
        return {**averages, **self.mode.state_dict(), "steps_done": torch.tensor(self.steps_done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state."""
        self.steps_done = int(state["steps_done"])
        self.numbers.resume(self.steps_done)
        for name, tensor in self.averages.items():
            tensor.copy_(state[f"averages.{name}"])
        self.mode.load_state_dict(state)

    @property
    def trained_parameters(self) -> Parameters:
        """Return the parameters to save: their running means, if there are any."""
        return self.averages or self.parameters

    def to_sae(self, metadata: dict[str, Any], parameters: Mapping[str, Tensor] | None = None) -> Sae:
        """Return the current SAE for inference on raw activations; `parameters` are those of all ranks combined."""
        parameters = dict(parameters or self.trained_parameters)
        buffers = {name: tensor.to(parameters["W_dec"].device) for name, tensor in self.buffers.items()}
        normalization = self.normalization.to(parameters["W_dec"].device)
        parameters = self.architecture.rotated(parameters, normalization, back=True)
        return self.architecture.to_sae(parameters, buffers, normalization, metadata)
