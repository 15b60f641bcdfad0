"""Every metric of an SAE beside that of its baselines, and the smallest difference that the metric can tell.

Two SAEs differ by more than noise in a metric if they differ by more than both of these, where they are known:

- `rows`: sqrt(2) times half the width of the metric's 95% interval over rows, the median over SAEs. SAEs are measured
  on the same rows, so their noise is partly shared and this is an upper bound.
- `seeds`: the 95% quantile of the difference of two SAEs that differ in their seed only: Student's t times sqrt(2)
  times the standard deviation over seeds, pooled over all settings that were trained with several seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics.comparison import settings_but
from .definitions import METRICS, Column

Row = Mapping[str, Any]
COMPARED: dict[str, Column] = {metric.key: metric for metric in METRICS if metric.better and metric.key != "l0"}
"""The metrics of which one direction is better."""
BY_CONSTRUCTION = ("dead_fraction", "max_decoder_cosine_mean", "relative_reconstruction_bias", "amortisation_gap")
"""Metrics that are not put beside baselines, because an orthonormal basis has the best values whatever the rows are."""


def compare_with_baselines(metrics: Sequence[Row], settings: Mapping[str, Row]) -> dict[str, Any]:
    """Return, by hook point, the metrics' resolution, and each SAE's metrics beside those of its baselines.

    `metrics` are the rows of metrics.json, `settings` the `training_settings` of each SAE, by name; SAEs whose
    settings differ in nothing but the seed are repetitions. A baseline is the one of its kind whose L0 is
    nearest.
    """
    rows = [row for row in metrics if row.get("hook_point") and row.get("explained_variance") is not None]
    found: dict[str, Any] = {}
    for hook_point in dict.fromkeys(str(row["hook_point"]) for row in rows):
        here = [row for row in rows if row["hook_point"] == hook_point]
        resolution = {key: noise for key in COMPARED if (noise := resolution_of(key, here, settings)) is not None}
        saes = [row for row in here if not row.get("baseline")]
        found[hook_point] = {
            "resolution": resolution,
            "saes": [{"name": row["name"], "metrics": _beside(row, here, resolution)} for row in saes],
        }
    return found


def resolution_of(key: str, rows: Sequence[Row], settings: Mapping[str, Row]) -> dict[str, Any] | None:
    """Return the smallest difference that a metric can tell, with its two parts; None if neither is known."""
    widths = [
        (bounds[1] - bounds[0]) / 2
        for row in rows
        if (bounds := (row.get("confidence_95") or {}).get(key)) and None not in bounds
    ]
    by_rows = math.sqrt(2) * float(np.median(widths)) if widths else None
    by_seeds, n_spare = _of_seeds(key, rows, settings)
    if by_rows is None and by_seeds is None:
        return None
    known = [part for part in (by_rows, by_seeds) if part is not None]
    return {"smallest_difference": max(known), "rows": by_rows, "seeds": by_seeds, "degrees_of_freedom": n_spare}


def _of_seeds(key: str, rows: Sequence[Row], settings: Mapping[str, Row]) -> tuple[float | None, int]:
    from scipy.stats import t as student

    groups: dict[str, dict[Any, float]] = {}
    for row in rows:
        own = settings.get(str(row["name"]))
        if own is None or own.get("seed") is None or row.get(key) is None:
            continue
        same = repr(sorted(settings_but(own, "seed").items()))
        groups.setdefault(same, {})[own["seed"]] = float(row[key])
    repeated = [np.array(list(values.values())) for values in groups.values() if len(values) > 1]
    n_spare = sum(len(values) - 1 for values in repeated)
    if not n_spare:
        return None, 0
    variance = sum(float(((values - values.mean()) ** 2).sum()) for values in repeated) / n_spare
    return float(student.ppf(0.975, n_spare)) * math.sqrt(2 * variance), n_spare


def _beside(row: Row, rows: Sequence[Row], resolution: Mapping[str, Any]) -> dict[str, Any]:
    """Return an SAE's metrics, each with its baselines, the best of them, and whether it is told apart from that."""
    nearest = _nearest(row, [other for other in rows if other.get("baseline")])
    found: dict[str, Any] = {}
    for key in COMPARED:
        value = row.get(key)
        known = {kind: other for kind, other in nearest.items() if other.get(key) is not None}
        if value is None or not known or key in BY_CONSTRUCTION:
            continue
        best = min(known, key=lambda kind: _loss(key, known[kind][key]))
        ahead = _loss(key, known[best][key]) - _loss(key, value)
        smallest = resolution.get(key, {}).get("smallest_difference")
        found[key] = {
            "value": value,
            "baselines": {kind: {"name": other["name"], "value": other[key]} for kind, other in known.items()},
            "best_baseline": best,
            "ahead": ahead,
            "told_apart": None if smallest is None else abs(value - known[best][key]) > smallest,
        }
    return found


def _nearest(row: Row, baselines: Sequence[Row]) -> dict[str, Row]:
    """Return, by kind, the baseline whose L0 is nearest; of frozen SAEs, one of the same architecture if there is."""

    def distance(other: Row) -> tuple[bool, float]:
        l0s = max(float(row["l0"]), 1e-9), max(float(other["l0"]), 1e-9)
        return other["architecture"] != row["architecture"], abs(math.log(l0s[0] / l0s[1]))

    kinds = dict.fromkeys(str(other["baseline"]) for other in baselines)
    return {kind: min((o for o in baselines if o["baseline"] == kind), key=distance) for kind in kinds}


def _loss(key: str, value: float) -> float:
    """Return a value of which less is better."""
    better = COMPARED[key].better
    return abs(value - 1) if better == "nearer 1" else -value if better == "higher" else value


def baseline_lines(comparison: Mapping[str, Any]) -> list[str]:
    """Return a line per SAE that names the metrics in which its best baseline is as good, or cannot be told apart."""
    lines = []
    for part in comparison.values():
        for sae in part["saes"]:
            close = []
            for key, found in sae["metrics"].items():
                if found["ahead"] <= 0 or found["told_apart"] is False:
                    kind = found["best_baseline"]
                    close.append(f"{COMPARED[key].label} ({kind} {found['baselines'][kind]['value']:.4f})")
            if close:
                lines.append(f"no better than a baseline  {sae['name']}: {', '.join(close)}")
    return lines
