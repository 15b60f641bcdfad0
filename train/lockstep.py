"""The trainers of a sweep, and the batches that they share."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..shared.core.compute.cores import on_cores
from .architectures.contract import SINGLE_PROCESS, Batch, Number
from .config import SaeConfig, TrainConfig
from .kernels import kernels_for
from .kernels.backend import Backend
from .kernels.reference import shortening
from .parallel.layout import Layout
from .plan import TrainPlan
from .step.sae_trainer import SaeTrainer
from .step.step_graphs import capture_on_cuda
from .stream.normalization import Normalization, normalization_across


def make_trainers(
    config: TrainConfig, plan: TrainPlan, normalizations: Mapping[str, Normalization], layout: Layout
) -> list[SaeTrainer]:
    """Return the trainers, at step zero, of the SAEs that this process trains.

    `normalizations` are those of the run's hook points.
    """
    saes = layout.saes_here(plan.saes)
    kernels = kernels_for(config.device, config.kernels)
    hooks = {place for sae in saes for place in sae.wiring.hook_points}
    kinds = {hook: normalizations[hook].to(config.device) for hook in hooks}
    plain = {hook: replace(kind, rotation=None) for hook, kind in kinds.items()}

    def of(sae: SaeConfig) -> Mapping[str, Normalization]:
        return kinds if sae.name in plan.rotates else plain

    dtype = getattr(torch, config.compute_dtype)
    capture = capture_on_cuda if config.cuda_graphs and torch.device(config.device).type == "cuda" else None
    return [
        SaeTrainer(
            config=sae,
            d_in=len(kind.mean),
            normalization=kind,
            schedule=plan.schedule,
            kernels=kernels,
            compute_dtype=dtype,
            device=config.device,
            across=layout.across,
            shard=layout.shard,
            capture=capture,
        )
        for sae, kind in ((plan.completed(sae), normalization_across(sae, of(sae))) for sae in saes)
    ]


PreparedBatches = dict[tuple[tuple[str, ...], tuple[str, ...], bool], Batch]
"""A batch for every combination of hook points that SAEs read and write, and of how they treat long rows."""


def step_all(trainers: list[SaeTrainer], prepared: PreparedBatches) -> dict[str, dict[str, Number]]:
    """Take a step with every SAE that has not diverged; return their metrics by name.

    On a CPU, steps run in parallel, those that took longest last time first, so that all cores finish at about the same
    time. If several processes train an SAE together, they synchronise within each step and take the SAEs in order.
    """
    taken: dict[str, dict[str, Number]] = {}

    def step(trainer: SaeTrainer) -> None:
        started = time.perf_counter()
        taken[trainer.name] = trainer.step(prepared[_key(trainer)])
        trainer.seconds = time.perf_counter() - started

    there = [trainer for trainer in trainers if not trainer.diverged]
    if all(trainer.device.type == "cpu" for trainer in there):
        alone = all(trainer.across is SINGLE_PROCESS for trainer in there)
        at_once = [sorted(there, key=lambda trainer: -trainer.seconds)] if alone else [[trainer] for trainer in there]
        for some in at_once:
            on_cores(step, some)
    else:
        for trainer in there:
            step(trainer)
    return {trainer.name: taken[trainer.name] for trainer in there}


def _key(trainer: SaeTrainer) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Return the hook points that an SAE reads and writes, and whether it weighs long rows instead of shortening."""
    wiring, by = trainer.config.wiring, trainer.normalization
    shortens = math.isfinite(by.max_norm) or (by.target is not None and math.isfinite(by.target.max_norm))
    return wiring.reads, wiring.writes, shortens and trainer.architecture.declares("weighs_rows")


def _side_by_side(batch: dict[str, Tensor], hook_points: tuple[str, ...]) -> Tensor:
    return batch[hook_points[0]] if len(hook_points) == 1 else torch.cat([batch[hook] for hook in hook_points], 1)


def prepare_batches(batch: dict[str, Tensor], trainers: list[SaeTrainer]) -> PreparedBatches:
    """Normalise activations once for all SAEs that read and write the same hook points and treat long rows alike."""
    prepared: PreparedBatches = {}
    for trainer in trainers:
        reads, writes, weighs = key = _key(trainer)
        if key in prepared:
            continue
        kernels, by, dtype = trainer.kernels, trainer.normalization, trainer.mode.compute_dtype
        x, x_compute = _normalised(_side_by_side(batch, reads), kernels, by, dtype, weighs)
        target, weights = None, shortening(x, by.max_norm) if weighs else None
        if by.target is not None:
            target, _ = _normalised(_side_by_side(batch, writes), kernels, by.target, torch.float32, weighs)
            if weights is not None:
                weights = torch.minimum(weights, shortening(target, by.target.max_norm))
        prepared[key] = Batch(x, x_compute, target, weights)
    return prepared


def _normalised(
    rows: Tensor, kernels: Backend, by: Normalization, dtype: torch.dtype, at_full_length: bool
) -> tuple[Tensor, Tensor]:
    max_norm = math.inf if at_full_length else by.max_norm
    if by.rotation is None:
        return kernels.normalise(rows, by.mean, by.scale, dtype, max_norm)
    x = by.rotation(kernels.normalise(rows, by.mean, by.scale, torch.float32, max_norm)[0])
    return x, x.to(dtype)
