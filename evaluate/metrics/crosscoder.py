"""Metrics that only crosscoders and cross-layer transcoders have: reconstruction and decoder norms at each target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ...shared.model.hook_points import members
from ...shared.sae import CrossLayerTranscoder, Sae
from ..saes.sae_folders import EvaluatedSae
from .bootstrap import point_estimates
from .encoding import EncodedRows
from .reconstruction import InputSums, ReconstructionSums, reconstruction_metrics

WRITES = 0.1
"""A latent writes to a hook point if its decoder norm there is at least this share of its largest one."""
NOT_BY_LAYER = (
    "not spliced into the model: its k largest latents of all layers are only known after the last layer has run; "
    'train with select_over = "layer" or batch_topk for these metrics'
)
NO_MODEL_METRICS = "a crosscoder reconstructs several hook points: `per_hook` has the losses at each"


def norm_shares(sae: Sae, n_hook_points: int) -> Float[np.ndarray, "d_sae hook_points"]:
    """Return each hook point's share of the sum of a latent's decoder norms; zero if all its norms are zero."""
    norms = sae.decoder_norms(n_hook_points)
    return (norms / norms.sum(dim=1, keepdim=True).clamp_min(1e-12)).cpu().numpy()


def norm_share_columns(sae: EvaluatedSae) -> dict[str, np.ndarray]:
    """Return the per-latent column `decoder_norm_share`, by hook point; empty for one target."""
    n = len(members(sae.target))
    return {"decoder_norm_share": norm_shares(sae.sae, n)} if n > 1 else {}


class HookPointSums:
    """Sums over rows of reconstructions of several hook points, kept for each of them."""

    def __init__(self, sae: Sae, target: str, n_groups: int, device: str = "cpu"):
        self.hook_points = members(target)
        norms = sae.decoder_norms(len(self.hook_points))
        self.writes: Bool[Tensor, "hook_points d_sae"] = (norms >= WRITES * norms.amax(dim=1, keepdim=True)).T
        self.sums = {hook_point: ReconstructionSums(n_groups, device) for hook_point in self.hook_points}

    def add(self, x: Float[Tensor, "rows d_in"], encoded: EncodedRows, group: Int64[Tensor, " rows"]) -> None:
        """Add rows. L0 and L1 of a hook point count only the latents that write to it."""
        n = len(self.hook_points)
        parts = zip(self.hook_points, x.chunk(n, 1), encoded.x_hat.chunk(n, 1), strict=True)
        for (hook_point, target, x_hat), writes in zip(parts, self.writes.to(encoded.latents.dtype), strict=True):
            l0, l1 = encoded.count_among(writes)
            self.sums[hook_point].add(target, x_hat, l0, l1, group)


def per_hook_metrics(
    sae: Sae, inputs: Mapping[str, InputSums], sums: HookPointSums | None, firings: Int64[np.ndarray, " d_sae"]
) -> dict[str, Any]:
    """Return what `metrics.json` holds beyond the metrics over all the reconstructed hook points together.

    `per_hook` has one row per hook point: its metrics, and its mean share of the live latents' decoder norms. Empty if
    `sums` is None, as for an SAE with one target.
    """
    if sums is None:
        return {}
    shares = norm_shares(sae, len(sums.hook_points))[firings > 0]
    rows = []
    for number, hook_point in enumerate(sums.hook_points):
        share = float(shares[:, number].mean()) if len(shares) else None
        row = {"hook_point": hook_point, "decoder_norm_share": share}
        row |= point_estimates(reconstruction_metrics, inputs[hook_point].sums() | sums.sums[hook_point].sums())
        rows.append(row)
    note = NO_MODEL_METRICS
    if isinstance(sae, CrossLayerTranscoder):
        if sae.chooses_by_layer:
            return {"per_hook": rows}
        note = NOT_BY_LAYER
    return {"per_hook": rows, "ce_loss_score": None, "kl_div_score": None, "model_metrics_note": note}
