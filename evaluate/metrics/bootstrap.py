"""Confidence intervals from resampled documents: documents are independent of each other, their rows are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

Sums = Mapping[str, Float[np.ndarray, "groups ..."]]
Metrics = Callable[[Sums], dict[str, np.ndarray]]

CONFIDENCE = 0.95


def point_estimates(metrics: Metrics, sums: Sums) -> dict[str, float | None]:
    """Return the metrics over all groups; None for one that is not finite."""
    totals = {name: value.sum(axis=0, keepdims=True) for name, value in sums.items()}
    return {name: finite_or_none(value[0]) for name, value in metrics(totals).items()}


def confidence_intervals(metrics: Metrics, sums: Sums, n_samples: int, seed: int) -> dict[str, tuple[float, float]]:
    """Return each metric's 95% percentile interval over resamples of the groups with replacement.

    A group is one document, or several if there are more than `held_out.MAX_GROUPS` documents. Groups whose sums are
    all zero are left out. Returns nothing if `n_samples` is 0 or fewer than two groups remain. The same seed gives
    every SAE the same resamples.
    """
    has_rows = np.any([value.reshape(len(value), -1).any(axis=1) for value in sums.values()], axis=0)
    occupied = np.flatnonzero(has_rows)
    if n_samples == 0 or len(occupied) < 2:
        return {}
    weights = resampling_weights(len(occupied), n_samples, seed)
    resampled = {name: weights @ value[occupied] for name, value in sums.items()}
    tail = (1 - CONFIDENCE) / 2
    intervals = {}
    for name, values in metrics(resampled).items():
        values = values[np.isfinite(values)]
        if len(values):
            low, high = np.quantile(values, [tail, 1 - tail])
            intervals[name] = (float(low), float(high))
    return intervals


def resampling_weights(n_groups: int, n_samples: int, seed: int) -> Float[np.ndarray, "samples groups"]:
    """Return how often each group is drawn in each of `n_samples` resamples with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_samples).astype(np.float64)


def finite_or_none(value: float) -> float | None:
    """Return a float that JSON can hold, or None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None
