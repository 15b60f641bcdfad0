"""The offline metrics: one pass over the store's held-out rows for all SAEs, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ...shared.core.terminal.progress import progress as show_progress
from ...shared.model.hook_points import members
from ..saes.hook_group import concatenate, width
from ..saes.sae_folders import EvaluatedSae
from .bootstrap import Sums, confidence_intervals, point_estimates
from .crosscoder import HookPointSums
from .encoding import encode, rows_at_a_time
from .held_out import HeldOut, RowBlock
from .latent_sums import LatentSums, density_summary
from .outliers import outliers_of
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
    """Read the held-out rows once; return the sums by target hook point (or group) and by SAE.

    Sums are kept for each document group twice: of rows that are not outliers of the target, then of outliers.
    """
    store = held_out.store
    groups = [group for sae in saes for group in (sae.hook_point, sae.target)]
    read = list(dict.fromkeys(hook_point for group in groups for hook_point in members(group)))
    targets = list(dict.fromkeys(group for sae in saes for group in (sae.target, *members(sae.target))))
    outliers = outliers_of(held_out, targets, block_rows, device)
    inputs = {group: InputSums(2 * held_out.n_groups, width(store, group), device) for group in targets}
    sums = {sae.name: _sums(sae, 2 * held_out.n_groups, device) for sae in saes}
    with show_progress(total=held_out.n_rows, unit="row", unit_scale=True, desc="evaluate") as progress:
        for block in held_out.blocks(read, block_rows, device):
            group = {}
            for target in targets:
                x = concatenate(block.activations, target)
                group[target] = block.group + held_out.n_groups * outliers[target].among(x)
                inputs[target].add(x, group[target])
            for sae in saes:
                _add_block(sae, block, group[sae.target], sums[sae.name])
            progress.update(len(block.group))
    return inputs, sums


def _add_block(sae: EvaluatedSae, block: RowBlock, group: Int64[Tensor, " rows"], sums: SaeSums) -> None:
    step = rows_at_a_time(sae.sae)
    x = concatenate(block.activations, sae.hook_point)
    target = x if sae.target == sae.hook_point else concatenate(block.activations, sae.target)
    for start in range(0, len(block.group), step):
        rows = slice(start, start + step)
        encoded = encode(sae.sae, x[rows])
        sums.reconstruction.add(target[rows], encoded.x_hat, encoded.l0, encoded.l1, group[rows])
        if sums.by_hook_point is not None:
            sums.by_hook_point.add(target[rows], encoded, group[rows])
        encoded.add_to(sums.latents)


def offline_metrics(
    inputs: InputSums, sums: SaeSums, bootstrap_samples: int, seed: int
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """Return one SAE's offline metrics and the confidence intervals of those computed from sums over rows.

    If the target has outliers, explained variance is also returned without them.
    """
    by_group = inputs.sums() | sums.reconstruction.sums()
    halves = {name: value.reshape(2, -1, *value.shape[1:]) for name, value in by_group.items()}
    rows = {name: half.sum(axis=0) for name, half in halves.items()}
    metrics: dict[str, Any] = dict(point_estimates(reconstruction_metrics, rows))
    intervals = confidence_intervals(reconstruction_metrics, rows, bootstrap_samples, seed)
    if n_outliers := int(halves["n_rows"][1].sum()):
        usual = {name: half[0] for name, half in halves.items()}
        metrics |= {"outlier_rows": n_outliers, "outlier_variance_share": _outlier_variance_share(halves)}
        metrics |= point_estimates(_explained_without_outliers, usual)
        intervals |= confidence_intervals(_explained_without_outliers, usual, bootstrap_samples, seed)
    metrics |= density_summary(sums.latents.density)
    return metrics, intervals


def _explained_without_outliers(sums: Sums) -> dict[str, np.ndarray]:
    return {"explained_variance_without_outliers": reconstruction_metrics(sums)["explained_variance"]}


def _outlier_variance_share(halves: Sums) -> float:
    """Return the outliers' share of the rows' squared distances from the mean of all rows."""
    n, x, squared_norm = (halves[name].sum(axis=1) for name in ("n_rows", "x", "squared_norm"))
    mean = x.sum(axis=0) / n.sum()
    distances = squared_norm - 2 * x @ mean + n * (mean @ mean)
    return float(distances[1] / distances.sum())
