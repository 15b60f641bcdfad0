"""Confidence intervals: against a plain resampling loop, and their coverage on known data."""

from __future__ import annotations

import numpy as np
import pytest

from thresher.evaluate.metrics.bootstrap import confidence_intervals, finite_or_none, point_estimates


def mean_and_ratio(sums):
    return {"mean": sums["total"] / sums["n_rows"], "ratio": sums["total"] / sums["other"]}


def document_sums(seed, n_documents=40):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, n_documents)
    values = [rng.normal(rng.normal(5, 1), 1, n) for n in lengths]
    return {
        "n_rows": lengths.astype(float),
        "total": np.array([v.sum() for v in values]),
        "other": np.array([(v**2).sum() for v in values]),
    }


def test_interval_is_that_of_resampling_documents_one_by_one():
    sums = document_sums(0)
    intervals = confidence_intervals(mean_and_ratio, sums, 4000, 0)
    rng = np.random.default_rng(99)
    draws = [rng.integers(0, 40, 40) for _ in range(4000)]
    means = [sums["total"][d].sum() / sums["n_rows"][d].sum() for d in draws]
    low, high = np.quantile(means, [0.025, 0.975])
    assert intervals["mean"] == pytest.approx((low, high), abs=0.1 * (high - low))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(200):
        low, high = confidence_intervals(mean_and_ratio, document_sums(seed, 60), 300, 1)["mean"]
        hits += low <= 5 <= high
    assert 176 <= hits <= 199


def test_groups_that_took_no_part_are_not_resampled():
    sums = document_sums(3)
    padded = {name: np.concatenate([np.zeros(500), value]) for name, value in sums.items()}
    assert confidence_intervals(mean_and_ratio, padded, 100, 7) == confidence_intervals(mean_and_ratio, sums, 100, 7)


def test_no_interval_from_one_document_or_without_resamples():
    one = {name: value[:1] for name, value in document_sums(0).items()}
    assert confidence_intervals(mean_and_ratio, one, 100, 0) == {}
    assert confidence_intervals(mean_and_ratio, document_sums(0), 0, 0) == {}


def test_estimate_sums_over_documents():
    sums = document_sums(5)
    assert point_estimates(mean_and_ratio, sums)["mean"] == pytest.approx(sums["total"].sum() / sums["n_rows"].sum())
    assert finite_or_none(np.float64("nan")) is None
    assert finite_or_none(np.float64("inf")) is None
    assert finite_or_none(np.float64(2)) == 2.0
