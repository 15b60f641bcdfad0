"""Train one SAE of a sweep: its parameters, optimizer, schedules and dead-latent counters."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...shared.sae import Sae
from ..architectures import make_architecture
from ..architectures.base import Architecture
from ..architectures.contract import SINGLE_PROCESS, Batch, Collectives, Number, Parameters, StepInput
from ..architectures.parts.latents import SPARSE_BELOW
from ..config import SaeConfig
from ..kernels.backend import Backend
from ..kernels.capacity import EntryCapacity
from ..stream.normalization import Normalization
from .fused_step import FusedStep
from .host_polls import DeadLatentPoll
from .optimizer import Optimizer
from .resampling import resample_dead_latents
from .schedule import lr_factor, sparsity_factor
from .step_graphs import Capture, StepGraphs

_EXPLOSION = 1e4
_MOST_DEAD_AFTER_TOKENS = 10_000_000


class Schedule(NamedTuple):
    """How long a run is, and how its learning rates rise and fall.

    A run that was continued to more steps has in `earlier_n_steps` the lengths that it had before. Its learning rate at
    a step is that of a run of the length that it had then; what else grows or counts over a share of the run is by the
    first length.
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

    def lr_factor(self, step: int, config: SaeConfig) -> float:
        """Return the factor of an SAE's peak learning rate at a step; what it leaves open is the run's."""
        fraction = self.decay_fraction if config.decay_fraction is None else config.decay_fraction
        n_steps = next((n for n in self.earlier_n_steps if step < n), self.n_steps)
        return lr_factor(step, n_steps, self.warmup_steps, fraction, config.lr_decay or self.lr_decay)


def read_metrics(metrics: Mapping[str, Number]) -> dict[str, float]:
    """Return the numbers, those on a device in one transfer."""
    names = [name for name, value in metrics.items() if isinstance(value, Tensor)]
    read = torch.stack([torch.as_tensor(metrics[name]).double() for name in names]).tolist() if names else []
    there = dict(zip(names, read, strict=True))
    return {name: there[name] if name in there else float(value) for name, value in metrics.items()}


class SaeTrainer:
    """One SAE in training. Nothing in it depends on the other SAEs of its sweep.

    `diverged` says why training stopped early, if it did; `seconds` what the last step took by its caller's clock. On
    a GPU a step does not wait for the device: the metrics are read, and divergence is noticed, when the run asks for
    them by `read_metrics` and `check`. A TopK SAE takes whole steps of fused kernels where the kernels have them,
    unless `fuse` is false. With those kernels shapes are fixed from look to look, and with `capture` steps whose
    shapes have settled are replayed as graphs.
    """

    def __init__(
        self,
        config: SaeConfig,
        d_in: int,
        normalization: Normalization,
        schedule: Schedule,
        kernels: Backend,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        fuse: bool = True,
        across: Collectives = SINGLE_PROCESS,
        capture: Capture | None = None,
    ):
        self.config = config
        self.name = config.name or config.architecture
        self.device = torch.device(device)
        self.normalization = normalization.to(self.device)
        self.schedule = schedule
        self.kernels = kernels
        d_out = len(normalization.target.mean) if normalization.target else d_in
        self.across = across
        self.architecture: Architecture = across.shard(make_architecture(config, d_in, d_out))
        initial = self.architecture.initial_parameters(torch.Generator().manual_seed(config.seed))
        self.parameters = {name: tensor.to(device) for name, tensor in initial.items()}
        self.buffers = {name: tensor.to(device) for name, tensor in self.architecture.initial_buffers().items()}
        self.optimizer = Optimizer(self.parameters, self.architecture, config.clip_grad_norm, across)
        self.W_enc_compute = self.parameters["W_enc"].to(compute_dtype, copy=True)
        self.W_dec_compute: Tensor | None = None
        self.optimizer.copies = {"W_enc": self.W_enc_compute}
        if self.device.type == "cpu" and across is SINGLE_PROCESS:
            self.W_dec_compute = self.parameters["W_dec"].to(compute_dtype)
            if self.W_dec_compute is not self.parameters["W_dec"]:
                self.optimizer.copies["W_dec"] = self.W_dec_compute
        self.tokens_since_fired = torch.zeros(len(self.W_enc_compute), dtype=torch.int64, device=device)
        n_tokens = schedule.n_steps_at_first * schedule.batch_size
        self.dead_after_tokens = config.dead_after_tokens or min(_MOST_DEAD_AFTER_TOKENS, max(n_tokens // 10, 1))
        self.sparsity_warmup_steps = self.architecture.sparsity_warmup_steps(schedule.n_steps_at_first)
        self.averages = {name: tensor.clone() for name, tensor in self.parameters.items()} if config.ema_decay else {}
        self.steps_done = 0
        self.seconds = 0.0
        self.initialised = False
        self._lr = 0.0
        self.diverged: str | None = None
        self._failure = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.waits = self.device.type != "cuda"
        # What changes from step to step, as [steps done, learning rate, sparsity's factor], for captured steps to read.
        self._now = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.fused_step: FusedStep | None = None
        if fuse and across is SINGLE_PROCESS:
            self._fuse(kernels, compute_dtype)
        fixed = kernels.fixed_shapes is not None and across is SINGLE_PROCESS
        self.dead_poll = DeadLatentPoll(self.dead_after_tokens) if fixed and self._revives_dead() else None
        self.room = EntryCapacity(self.device) if fixed and not self.fused_step else None
        # A subclass may do on the host what the class that says it is capturable does not.
        capturable = fixed and vars(type(self.architecture)).get("capturable", False)
        self._graphs = StepGraphs(capture if capturable else None)

    def _revives_dead(self) -> bool:
        """Return whether the loss depends on which latents are dead."""
        if self.fused_step is not None:
            return self.fused_step.has_auxk
        return self.architecture.revives_dead

    def _fuse(self, kernels: Backend, compute_dtype: torch.dtype) -> None:
        """Let parameters, moments and counters be those of the fused step, where there is one."""
        if not self.optimizer.unit_norm_decoder or self.optimizer.weight_decay:
            return
        self.fused_step = FusedStep.of(
            kernels,
            self.architecture,
            self.parameters,
            self.normalization.total_variance,
            self.dead_after_tokens,
            compute_dtype,
        )
        if self.fused_step is None:
            return
        step = self.fused_step.step
        self.parameters = self.optimizer.parameters = step.parameters()
        self.optimizer.exp_avg, self.optimizer.exp_avg_sq = step.moments()
        self.optimizer.steps = step.steps
        self.optimizer.copies = {}
        self.W_enc_compute = step.W_enc.shadow
        self.tokens_since_fired = step.tokens_since_fired

    @torch.no_grad()
    def step(self, batch: Batch) -> dict[str, Number]:
        """Train on one batch and return the step's metrics.

        On divergence a CPU's step changes nothing and sets `diverged`; a GPU's leaves it to `check`.
        """
        if self.steps_done == 0 and not self.initialised:
            self._start(batch)
        self._lr = self.architecture.lr * self.schedule.lr_factor(self.steps_done, self.config)
        # A whole step reads nothing else of a batch, and a captured one copies what it reads.
        needed = batch if self.fused_step is None else Batch(batch.x_compute, batch.x_compute)
        taken = self._graphs(self._take, needed, self._look(batch))
        if self.diverged is not None:
            return {"loss": taken["loss"], "lr": self._lr}
        self.steps_done += 1
        self._resample(batch)
        self._average()
        metrics = taken | {"lr": self._lr}
        return {**read_metrics(metrics)} if self.waits else metrics

    def _start(self, batch: Batch) -> None:
        """Let the architecture see the first batch, of all ranks, before the first step."""
        if type(self.architecture).start is not Architecture.start:
            x = self.across.all_values(batch.x)
            self.architecture.start(self.parameters, Batch(x, x))
            self._refresh()

    def initialise(self, parameters: Parameters, buffers: Mapping[str, Tensor]) -> None:
        """Start from an SAE's parameters, in normalised units, and buffers rather than from random ones."""
        for own, given in ((self.parameters, parameters), (self.averages, parameters), (self.buffers, buffers)):
            for name, tensor in own.items():
                tensor.copy_(given[name])
        self._refresh()
        self.initialised = True

    def _look(self, batch: Batch) -> Hashable | None:
        """Bring what changes from step to step to the device, and return all else that a step's launches follow from.

        That is None where the step must wait for the device, or has waited last time.
        """
        done = self.steps_done
        if self.fused_step is not None:
            self.fused_step.step.set_lr(self._lr)
        if not self.waits:
            self._now[1].fill_(self._lr)
            self._now[2].fill_(sparsity_factor(done, self.sparsity_warmup_steps))
        n_dead = self.dead_poll.before(done, len(batch.x), self.tokens_since_fired) if self.dead_poll else 0
        if self.room is None:
            return len(batch.x), n_dead
        waited = self.room.waited
        self.room.before(done, SPARSE_BELOW * len(batch.x) * self.architecture.d_sae)
        decided = self.architecture.decided_at(done)
        key = (len(batch.x), n_dead, self.room.capacity, self.room.margin, decided)
        return None if waited or self.room.exact or decided is None else key

    def _take(self, batch: Batch) -> dict[str, Number]:
        """Take a step; all of it may be captured."""
        dead = self.tokens_since_fired >= self.dead_after_tokens
        n_dead = self.across.over_latents(torch.count_nonzero(dead).double())
        self._now[0].add_(1)
        if self.fused_step is not None:
            taken = self.fused_step(batch.x_compute, self.dead_poll.n_dead if self.dead_poll else 0)
            self._note_failure(taken["loss"], taken["mse"])
        else:
            taken = self._step_by_ops(batch, dead, n_dead)
        mse, l0 = taken.pop("mse"), taken.pop("l0")
        return taken | {
            "explained_variance": 1 - mse / self.normalization.total_variance,
            "l0": l0,
            "dead_fraction": n_dead / self.architecture.d_sae,
        }

    def _any_dead(self, batch: Batch, n_dead: Tensor) -> bool:
        """Return whether the loss has to do with dead latents; where no look has said it, the device is asked.

        It is asked nothing while too few tokens have been seen for any latent to be dead.
        """
        if self.room is not None:
            return self.dead_poll is not None and self.dead_poll.n_dead > 0
        can_be_dead = self.steps_done * max(self.schedule.batch_size, len(batch.x)) >= self.dead_after_tokens
        return self.architecture.revives_dead and can_be_dead and bool(n_dead > 0)

    def _step_by_ops(self, batch: Batch, dead: Tensor, n_dead: Tensor) -> dict[str, Number]:
        done = self.steps_done
        output = self.architecture.step(
            self.parameters,
            batch,
            StepInput(
                kernels=self.kernels,
                W_enc_compute=self.W_enc_compute,
                total_variance=self.normalization.total_variance,
                W_dec_compute=self.W_dec_compute,
                dead=dead if self._any_dead(batch, n_dead) else None,
                sparsity_scale=sparsity_factor(done, self.sparsity_warmup_steps) if self.waits else self._now[2],
                buffers=self.buffers,
                steps_done=done,
                step_number=None if self.waits else self._now[0] - 1,
                across=self.across,
                room=self.room,
                n_dead=self.dead_poll.n_dead if self.dead_poll else self.across.room_for_dead(dead),
            ),
        )
        output = self.across.combine(output)
        taken: dict[str, Number] = {"loss": output.loss, "mse": output.mse, "l0": output.l0, **output.terms}
        self._note_failure(output.loss, output.mse)
        if self.diverged is not None:
            return taken
        lr = self._lr if self.waits else self._now[1].float()
        grad_norm = self.optimizer.step(output.gradients, lr, self.room.failed if self.room else None)
        self.tokens_since_fired += self.across.rows(len(batch.x))
        self.tokens_since_fired.masked_fill_(output.fired, 0)
        if grad_norm is not None:
            taken["grad_norm"] = grad_norm
        if self.room is not None and self.room.asked:
            taken["skipped_steps"] = self.room.skipped.double()
        return taken

    def _note_failure(self, loss: Number, mse: Number) -> None:
        """Keep the first step that diverged on the device; on a CPU, look at once."""
        limit = _EXPLOSION * self.normalization.total_variance
        if self.waits:
            if not math.isfinite(loss) or mse > limit:
                self.diverged = _failure(self.steps_done + 1, float(loss), float(mse))
            return
        loss, mse = (
            number.double() if isinstance(number, Tensor) else self._failure.new_full((), number)
            for number in (loss, mse)
        )
        bad = ~(torch.isfinite(loss) & (mse <= limit)) & (self._failure[0] == 0)
        self._failure.copy_(torch.where(bad, torch.stack([self._now[0], loss, mse]), self._failure))

    def check(self) -> None:
        """Set `diverged` if a step has diverged; this waits for the device."""
        step, loss, mse = self._failure.tolist()
        if step and self.diverged is None:
            self.diverged = _failure(int(step), loss, mse)

    def _resample(self, batch: Batch) -> None:
        """Start dead latents anew where it is time to: at intervals in the first half of the run."""
        every, done = self.config.resample_every_tokens, self.steps_done
        if not every or 2 * done > self.schedule.n_steps_at_first:
            return
        if done * self.schedule.batch_size // every == (done - 1) * self.schedule.batch_size // every:
            return
        dead = self.tokens_since_fired >= self.dead_after_tokens
        if not bool(dead.any()):
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
        if self.fused_step is not None:
            self.fused_step.step.refresh()
        else:
            self.optimizer.copy()

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a later step depends on; names are the same on every path, so one can go on from another."""
        averages = {f"averages.{name}": tensor for name, tensor in self.averages.items()}
        looks = {"looks.dead": self.dead_poll, "looks.room": self.room}
        averages |= {name: look.state() for name, look in looks.items() if look is not None}
        if self.fused_step is not None:
            return {**self.fused_step.state_dict(), **averages, "steps_done": torch.tensor(self.steps_done)}
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
        self._now[0].fill_(self.steps_done)
        if self.dead_poll is not None:
            self.dead_poll.load(state.get("looks.dead"))
        if self.room is not None:
            self.room.load(state.get("looks.room"))
        for name, tensor in self.averages.items():
            tensor.copy_(state[f"averages.{name}"])
        if self.fused_step is not None:
            self.fused_step.load_state_dict(state)
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
