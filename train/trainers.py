"""A sweep's trainers, and what they share of each batch."""

from __future__ import annotations

import torch

from ..shared.store import ActivationStore
from .architectures.base import Batch
from .config import TrainConfig
from .kernels import kernels_for
from .normalization import normalization_across, normalization_of
from .parallel.layout import Layout
from .plan import Plan
from .sae_trainer import SaeTrainer
from .step_graphs import capture_on_cuda


def make_trainers(config: TrainConfig, plan: Plan, store: ActivationStore, layout: Layout) -> list[SaeTrainer]:
    """Return the trainers of the sweep's SAEs that are trained here, at step zero."""
    saes = layout.saes_here(plan.saes)
    kernels = kernels_for(config.device, config.kernels)
    kinds = {
        hook: normalization_of(store, hook, config.normalize_activations).to(config.device)
        for hook in {place for sae in saes for place in sae.places}
    }
    dtype = getattr(torch, config.compute_dtype)
    across = layout.across
    capture = capture_on_cuda if config.cuda_graphs and torch.device(config.device).type == "cuda" else None
    return [
        SaeTrainer(sae, len(kind.mean), kind, plan.schedule, kernels, dtype, config.device, True, across, capture)
        for sae, kind in ((sae, normalization_across(sae, kinds)) for sae in saes)
    ]


def prepare(
    batch: dict[str, torch.Tensor], trainers: list[SaeTrainer]
) -> dict[tuple[tuple[str, ...], str | None], Batch]:
    """Normalise activations once for all SAEs that have the same inputs and target."""
    prepared: dict[tuple[tuple[str, ...], str | None], Batch] = {}
    for trainer in trainers:
        inputs, out = key = (trainer.config.inputs, trainer.config.hook_point_out)
        if key not in prepared:
            rows = batch[inputs[0]] if len(inputs) == 1 else torch.cat([batch[hook] for hook in inputs], 1)
            dtype, normalization = trainer.W_enc_compute.dtype, trainer.normalization
            if rows.is_cuda and hasattr(trainer.kernels, "normalise") and isinstance(normalization.scale, float):
                x, x_compute = trainer.kernels.normalise(rows, normalization.mean, normalization.scale, dtype)
            else:
                x = normalization.apply(rows)
                x_compute = x.to(dtype)
            target = trainer.normalization.target
            y = target.apply(batch[out]) if target is not None and out is not None else None
            prepared[key] = Batch(x, x_compute, y)
    return prepared
