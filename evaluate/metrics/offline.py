"""The offline metrics: one pass over the store's held-out rows for all SAEs, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...shared.core.terminal.progress import progress as show_progress
from ...shared.model.hook_points import members
from ..saes.hook_group import concatenate, width
from ..saes.sae_folders import EvaluatedSae
from .bootstrap import confidence_intervals, point_estimates
from .crosscoder import HookPointSums
from .encoding import encode, rows_at_a_time
from .held_out import HeldOut, RowBlock
from .latent_sums import LatentSums, density_summary
from .reconstruction import InputSums, ReconstructionSums, reconstruction_metrics


@dataclass(frozen=True)
class SaeSums:
    """One SAE's sums over the held-out rows; `by_hook_point` only where several hook points are reconstructed."""

    reconstruction: ReconstructionSums
    latents: LatentSums
    by_hook_point: HookPointSums | None = None


def _sums(sae: EvaluatedSae, n_groups: int, device: str) -> SaeSums:
    several = len(members(sae.target)) > 1
    return SaeSums(
        ReconstructionSums(n_groups, device),
        LatentSums(sae.sae.d_sae, device),
        HookPointSums(sae.sae, sae.target, n_groups, device) if several else None,
    )


@torch.inference_mode()
def accumulate(
    saes: Sequence[EvaluatedSae], held_out: HeldOut, block_rows: int, device: str
) -> tuple[dict[str, InputSums], dict[str, SaeSums]]:
    """Read the held-out rows once; return the sums by target hook point (or group) and by SAE."""
    store = held_out.store
    groups = [group for sae in saes for group in (sae.hook_point, sae.target)]
    read = list(dict.fromkeys(hook_point for group in groups for hook_point in members(group)))
    targets = list(dict.fromkeys(group for sae in saes for group in (sae.target, *members(sae.target))))
    inputs = {group: InputSums(held_out.n_groups, width(store, group), device) for group in targets}
    sums = {sae.name: _sums(sae, held_out.n_groups, device) for sae in saes}
    with show_progress(total=held_out.n_rows, unit="row", unit_scale=True, desc="evaluate") as progress:
        for block in held_out.blocks(read, block_rows, device):
            for target in targets:
                inputs[target].add(concatenate(block.activations, target), block.group)
            for sae in saes:
                _add_block(sae, block, sums[sae.name])
            progress.update(len(block.group))
    return inputs, sums


def _add_block(sae: EvaluatedSae, block: RowBlock, sums: SaeSums) -> None:
    step = rows_at_a_time(sae.sae)
    x = concatenate(block.activations, sae.hook_point)
    target = x if sae.target == sae.hook_point else concatenate(block.activations, sae.target)
    for start in range(0, len(block.group), step):
        rows = slice(start, start + step)
        encoded = encode(sae.sae, x[rows])
        sums.reconstruction.add(target[rows], encoded.x_hat, encoded.l0, encoded.l1, block.group[rows])
        if sums.by_hook_point is not None:
            sums.by_hook_point.add(target[rows], encoded, block.group[rows])
        encoded.add_to(sums.latents)


def offline_metrics(
    inputs: InputSums, sums: SaeSums, bootstrap_samples: int, seed: int
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """Return one SAE's offline metrics and the confidence intervals of those computed from sums over rows."""
    rows = inputs.sums() | sums.reconstruction.sums()
    metrics: dict[str, Any] = dict(point_estimates(reconstruction_metrics, rows))
    metrics |= density_summary(sums.latents.density)
    return metrics, confidence_intervals(reconstruction_metrics, rows, bootstrap_samples, seed)
