"""Thresher's training step, with the time of each operation."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from thresher.train.architectures import make_config
from thresher.train.kernels import kernels_for
from thresher.train.kernels.backend import Backend
from thresher.train.lockstep import prepare_batches, step_all
from thresher.train.memory import keep_freed_memory
from thresher.train.step.op_by_op import OpByOp
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization

OPERATIONS = (
    "largest_of_rows",
    "entries_above",
    "largest_of_batch",
    "pre_activations",
    "values_at",
    "grad_values",
    "decode",
    "sum_by_latent",
)


class Thresher:
    """`SaeTrainer.step` on inputs that are normalised already; `seconds` adds up what each operation took, those
    that it called included."""

    def __init__(self, architecture: str, d_in: int, options: Any, dtype: torch.dtype = torch.bfloat16):
        self.seconds: dict[str, float] = defaultdict(float)
        keys: dict[str, Any] = {
            "topk": {"k": options.k},
            "batch_topk": {"k": options.k},
            "jumprelu": {"l0_coefficient": options.sparsity},
        }.get(architecture, {"l1_coefficient": options.sparsity})
        config = make_config(hook_point="h", architecture=architecture, d_sae=options.d_sae, lr=options.lr, **keys)
        normalization = Normalization(torch.zeros(d_in), 1.0, float(d_in))
        schedule = Schedule(1_000_000, options.batch_size, 1, 0.0)
        keep_freed_memory()  # as `thresher train` does
        self.trainer = SaeTrainer(
            config=config,
            d_in=d_in,
            normalization=normalization,
            schedule=schedule,
            kernels=self._timed(kernels_for("cpu")),
            compute_dtype=dtype,
        )
        assert isinstance(self.trainer.mode, OpByOp)
        optimizer = self.trainer.mode.optimizer
        optimizer.step = self._timing("optimizer", optimizer.step)  # type: ignore[method-assign]

    def _timed(self, kernels: Backend) -> Backend:
        for name in OPERATIONS:
            setattr(kernels, name, self._timing(name, getattr(kernels, name)))
        return kernels

    def _timing(self, name: str, operation: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = operation(*arguments, **named)
            self.seconds[name] += time.perf_counter() - started
            return result

        return call

    def step(self, x: torch.Tensor) -> None:
        """Train on one batch."""
        step_all([self.trainer], prepare_batches({"h": x}, [self.trainer]))
        if self.trainer.diverged:
            raise RuntimeError(self.trainer.diverged)

    def silence(self, bias: float) -> None:
        """Lower the encoder's bias so that about as many latents fire as in a trained SAE."""
        parameters = self.trainer.parameters
        parameters["b_gate" if "b_gate" in parameters else "b_enc"].fill_(bias)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return latents."""
        return self.trainer.to_sae({}).encode(x)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction."""
        return self.trainer.to_sae({})(x)
