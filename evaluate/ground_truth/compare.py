"""How well latents detect the features that they match, on new rows drawn from the law of a synthetic store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ...shared.core.terminal.progress import progress as show_progress
from ...shared.sae import Sae
from ...shared.synthetic.sampler import Firing, Sampler
from ...shared.synthetic.truth import Truth
from ..config import EvaluateConfig
from ..metrics.bootstrap import confidence_intervals, point_estimates
from ..metrics.encoding import encode, rows_at_a_time
from ..saes.sae_folders import EvaluatedSae
from .match import Match, match_features

SEED = 0xE7A1
"""First seed of the batches that are drawn; the batches of a harvest have seeds that a hash makes."""
GROUPS = 50


class GroundTruth(NamedTuple):
    """What a comparison found: the metrics of an SAE, and a table with one row per latent."""

    metrics: dict[str, Any]
    latents: dict[str, np.ndarray]


def ground_truth(saes: Sequence[EvaluatedSae], truth: Truth, config: EvaluateConfig) -> dict[str, GroundTruth]:
    """Return what `config.ground_truth_rows` rows say of every SAE, by name.

    Rows are drawn in batches, which are the groups of the confidence intervals.
    """
    if not saes:
        return {}
    sampler = Sampler(truth)
    matches = {sae.name: match_features(sae.sae, truth) for sae in saes}
    counts: dict[str, list[dict[str, np.ndarray]]] = {sae.name: [] for sae in saes}
    n_rows = -(-config.ground_truth_rows // GROUPS)
    parent = truth.forest.parent.to(truth.vectors.device)
    with show_progress(total=GROUPS * n_rows, unit="row", unit_scale=True, desc="ground truth") as progress:
        for group in range(GROUPS):
            firing = sampler.fire(n_rows, SEED + group)
            x = sampler.activations(firing, n_rows)
            features = _Features.of(firing, n_rows, parent)
            for sae in saes:
                counts[sae.name].append(_count(sae.sae, x, features, matches[sae.name]))
            progress.update(n_rows)
    return {name: _result(matches[name], found, config) for name, found in counts.items()}


class _Features(NamedTuple):
    """Which features fire in the rows of a batch, with and without a child that fires, and in how many rows."""

    fires: Bool[Tensor, "rows n_features"]
    with_child: Bool[Tensor, "rows n_features"]
    n_fires: Int64[Tensor, " n_features"]
    n_with_child: Int64[Tensor, " n_features"]

    @classmethod
    def of(cls, firing: Firing, n_rows: int, parent: Int64[Tensor, " n_features"]) -> _Features:
        n_features = len(parent)
        fires = torch.zeros(n_rows, n_features, dtype=torch.bool, device=firing.row.device)
        with_child = torch.zeros_like(fires)
        fires[firing.row, firing.feature] = True
        parents_of_firing = parent[firing.feature]
        has_parent = parents_of_firing >= 0
        with_child[firing.row[has_parent], parents_of_firing[has_parent]] = True
        parents = with_child.nonzero()[:, 1]
        return cls(
            fires,
            with_child,
            torch.bincount(firing.feature, minlength=n_features),
            torch.bincount(parents, minlength=n_features),
        )


@torch.inference_mode()
def _count(sae: Sae, x: Float[Tensor, "rows d_in"], features: _Features, match: Match) -> dict[str, np.ndarray]:
    """Count, per latent, rows where it and its feature fire: alone, together, and with a child of the feature."""
    n_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=x.device)
    n_hit, n_hit_with_child = torch.zeros_like(n_fired), torch.zeros_like(n_fired)
    ratio = 0.0
    step = rows_at_a_time(sae)
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        encoded = encode(sae, x[part])
        ratio += float((encoded.x_hat.norm(dim=1) / x[part].norm(dim=1)).double().sum())
        row, column = encoded.latents.nonzero(as_tuple=True)
        latent = column if encoded.top_indices is None else encoded.top_indices[row, column]
        hit = features.fires[part][row, match.feature[latent]]
        with_child = hit & features.with_child[part][row, match.feature[latent]]
        n_fired += torch.bincount(latent, minlength=sae.d_sae)
        n_hit += torch.bincount(latent[hit], minlength=sae.d_sae)
        n_hit_with_child += torch.bincount(latent[with_child], minlength=sae.d_sae)
    counts = {
        "fired": n_fired,
        "hit": n_hit,
        "hit_with_child": n_hit_with_child,
        "true": features.n_fires[match.feature],
        "true_with_child": features.n_with_child[match.feature],
        "true_firings": features.n_fires.sum(),
    }
    return {name: value.cpu().numpy().astype(np.float64) for name, value in counts.items()} | {
        "ratio": np.array(ratio),
        "rows": np.array(float(len(x))),
    }


def _scores(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return each latent's precision, recall and F1; 0 where a latent or its feature never fires."""
    precision = _ratio(sums["hit"], sums["fired"])
    recall = _ratio(sums["hit"], sums["true"])
    return {"precision": precision, "recall": recall, "f1": _ratio(2 * precision * recall, precision + recall)}


def _metrics(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name: values.mean(axis=1) for name, values in _scores(sums).items()}
    with_child = sums["true_with_child"]
    alone = sums["true"] - with_child
    missed = 1 - _ratio(sums["hit_with_child"], with_child)
    missed_alone = 1 - _ratio(sums["hit"] - sums["hit_with_child"], alone)
    counted = (with_child > 0) & (alone > 0) & (sums["hit"] > 0)
    n_counted = counted.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found["absorption"] = np.where(counted, missed - missed_alone, 0).sum(axis=1) / n_counted
    return found | {"shrinkage": sums["ratio"] / sums["rows"], "true_l0": sums["true_firings"] / sums["rows"]}


def _result(match: Match, counts: Sequence[Mapping[str, np.ndarray]], config: EvaluateConfig) -> GroundTruth:
    sums = {name: np.stack([count[name] for count in counts]) for name in counts[0]}
    metrics: dict[str, Any] = dict(point_estimates(_metrics, sums))
    intervals = confidence_intervals(_metrics, sums, config.bootstrap_samples, config.seed)
    metrics |= {"mcc": match.mcc, "uniqueness": match.uniqueness, "splitting": match.splitting}
    if intervals:
        metrics["confidence_95"] = {name: list(bounds) for name, bounds in intervals.items()}
    totals = {name: value.sum(axis=0, keepdims=True) for name, value in sums.items()}
    latents: dict[str, np.ndarray] = {
        "latent": np.arange(len(match.feature)),
        "feature": match.feature.cpu().numpy(),
        "cosine": match.cosine.cpu().numpy(),
    }
    return GroundTruth(metrics, latents | {name: values[0] for name, values in _scores(totals).items()})


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
