"""The statistics of a contrast against their definitions, by counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from thresher.evaluate.causal.statistics import Z95, auc, auc_interval, mean_interval, q_values, rank_test


@pytest.fixture(scope="module")
def groups():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (9, 5)).astype(float), rng.integers(1, 8, (11, 5)).astype(float)
    a[:, 4], b[:, 4] = 2.0, 2.0
    return a, b


def wins(x, y):
    return np.mean([(p > q) + (p == q) / 2 for p, q in itertools.product(x, y)])


def test_auc_counts_pairs(groups):
    a, b = groups
    assert auc(a, b) == pytest.approx([wins(a[:, i], b[:, i]) for i in range(5)])


def test_the_p_value_is_near_that_of_permutations(groups):
    a, b = groups
    found, rng = rank_test(a, b), np.random.default_rng(1)
    assert found[4] == 1
    for column in (0, 1):
        both = np.concatenate([a[:, column], b[:, column]])
        distance = abs(wins(a[:, column], b[:, column]) - 0.5)
        drawn = [
            abs(wins(shuffled[:9], shuffled[9:]) - 0.5) for shuffled in (rng.permutation(both) for _ in range(1500))
        ]
        assert found[column] == pytest.approx(np.mean(np.array(drawn) >= distance - 1e-12), abs=0.03)


def test_the_interval_of_an_auc_solves_its_equation():
    for value, m, n in ((0.8, 12, 30), (0.5, 8, 8), (1.0, 10, 10), (0.0, 5, 9)):
        for theta in auc_interval(value, m, n):
            middle = (m + n) / 2 - 1
            spread = 1 + middle * (1 - theta) / (2 - theta) + middle * theta / (1 + theta)
            distance = Z95 * np.sqrt(theta * (1 - theta) * spread / (m * n))
            assert abs(theta - value) == pytest.approx(distance, abs=1e-6)
    low, high = auc_interval(1.0, 10, 10)
    assert high == 1
    assert 0.6 < low < 0.95


def test_q_is_the_smallest_rate_at_which_a_test_is_rejected():
    p = np.array([0.001, 0.2, 0.012, 0.04, 0.9, 0.039])
    for i, q in enumerate(q_values(p)):
        for rate, rejected in ((q + 1e-9, True), (q - 1e-9, False)):
            ordered = np.sort(p)
            passing = [k for k in range(len(p)) if ordered[k] <= rate * (k + 1) / len(p)]
            limit = ordered[max(passing)] if passing else -1
            assert (p[i] <= limit) == rejected


def test_the_interval_of_a_mean():
    values = np.random.default_rng(2).normal(3, 1, 200)
    low, high = mean_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.15)
    assert low < values.mean() < high
    assert mean_interval(values[:1]) is None
