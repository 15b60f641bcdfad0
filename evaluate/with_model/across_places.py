"""What the results say of an SAE that reconstructs several hook points: a crosscoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..metrics.bootstrap import estimate
from ..metrics.crosscoder import norm_shares
from ..metrics.offline import SaeSums
from ..metrics.reconstruction import InputSums, reconstruction_metrics
from ..saes.hook_group import places
from ..saes.sae_folders import EvaluatedSae
from .splice_losses import run_name, splice_metrics

NO_MODEL_METRICS = "a crosscoder reconstructs several hook points: `per_hook` has the losses at each"


def across_places(sae: EvaluatedSae, inputs: Mapping[str, InputSums], sums: SaeSums) -> dict[str, Any]:
    """Return what `metrics.json` says of a crosscoder beyond the metrics over all its hook points together.

    `per_hook` has a row per hook point: its metrics, and the mean share that it has of the live latents' decoder
    norms. Empty for an SAE of one target.
    """
    if sums.by_place is None:
        return {}
    shares = norm_shares(sae.sae, len(sums.by_place.places))[sums.latents.firings > 0]
    rows = []
    for number, place in enumerate(sums.by_place.places):
        row = {"hook_point": place, "decoder_norm_share": float(shares[:, number].mean()) if len(shares) else None}
        row |= estimate(reconstruction_metrics, inputs[place].sums() | sums.by_place.sums[place].sums())
        rows.append(row)
    missing = {"ce_loss_score": None, "kl_div_score": None, "model_metrics_note": NO_MODEL_METRICS}
    return {"per_hook": rows, **missing}


def losses_across_places(sae: EvaluatedSae, losses: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Return, by hook point, a crosscoder's losses with its reconstruction spliced in there alone."""
    spliced_in = places(sae.target)
    if len(spliced_in) == 1:
        return {}
    runs = {place: losses[run_name(sae, place)] for place in spliced_in}
    return {"per_hook": [{"hook_point": place} | estimate(splice_metrics, sums) for place, sums in runs.items()]}


def place_columns(sae: EvaluatedSae) -> dict[str, np.ndarray]:
    """Return the column per latent that only crosscoders have: `decoder_norm_share`, by hook point."""
    n = len(places(sae.target))
    return {"decoder_norm_share": norm_shares(sae.sae, n)} if n > 1 else {}
