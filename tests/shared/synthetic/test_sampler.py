"""The law of synthetic rows against a direct draw of every feature, and its parts against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from thresher.shared.core.errors import ConfigError
from thresher.shared.synthetic.law import LAWS, SyntheticLaw, find_law
from thresher.shared.synthetic.orthogonal import orthogonalise
from thresher.shared.synthetic.sampler import Sampler
from thresher.shared.synthetic.truth import firing_probabilities, make_forest, make_truth, read_truth

SMALL = SyntheticLaw(
    n_features=160, d_in=16, n_roots=3, branching=3, depth=2, max_probability=0.5, min_probability=0.01, seed=7
)
N = 40_000


def children_of(law):
    """Return each feature's children, numbering the trees level by level with a queue."""
    children = {i: [] for i in range(law.n_features)}
    level, free = list(range(law.n_roots)), law.n_roots
    for _ in range(law.depth):
        following = []
        for node in level:
            for _ in range(law.branching):
                if free < law.n_features:
                    children[node].append(free)
                    following.append(free)
                    free += 1
        level = following
    return children


def draw_directly(truth, n, seed):
    """Draw every feature of every row from its definition, in float64 NumPy."""
    law, rng = truth.law, np.random.default_rng(seed)
    factor, own, threshold, mean, deviation = (
        tensor.double().numpy()
        for tensor in (truth.factor, truth.own_deviation, truth.threshold, truth.magnitude, truth.deviation)
    )
    gaussian = rng.standard_normal((n, factor.shape[1])) @ factor.T + rng.standard_normal((n, law.n_features)) * own
    values = np.where(gaussian > threshold, np.maximum(mean + deviation * rng.standard_normal(gaussian.shape), 0), 0)
    children = children_of(law)
    for parent in range(law.n_features):  # parents are numbered before their children
        group = children[parent]
        if not group:
            continue
        for row in np.flatnonzero((values[:, group] > 0).any(1)):
            active = [child for child in group if values[row, child] > 0]
            if values[row, parent] == 0:
                values[row, group] = 0
                continue
            if law.exclusive_siblings and len(group) > 1:
                keep = rng.choice(active)
                values[row, [child for child in group if child != keep]] = 0
            if law.scale_by_parent:
                values[row, group] *= values[row, parent] / mean[parent]
    return values


def dense(firing, n, n_features):
    values = np.zeros((n, n_features))
    values[firing.row.numpy(), firing.feature.numpy()] = firing.magnitude.numpy()
    return values


def z_scores(a, b, n):
    """Return how far apart two shares of n rows are, in standard errors; only where both are common enough."""
    spread = np.sqrt((a * (1 - a) + b * (1 - b)) / n)
    return ((a - b) / np.maximum(spread, 1e-12))[(a + b) * n > 40]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"exclusive_siblings": False, "scale_by_parent": False, "compensate_probabilities": False},
        {"n_roots": 0},
        {"correlation_scale": 0.25, "correlation_rank": 4},
    ],
    ids=["forest", "independent siblings", "no trees", "strong correlation"],
)
def test_rows_have_the_law_of_a_direct_draw(change):
    truth = make_truth(replace(SMALL, **change))
    ours = dense(Sampler(truth).fire(N, 0), N, SMALL.n_features)
    direct = draw_directly(truth, N, 0)
    fires, expected = ours > 0, direct > 0
    rates = z_scores(fires.mean(0), expected.mean(0), N)
    assert len(rates) == SMALL.n_features
    assert np.abs(rates).max() < 4.5
    assert 0.8 < rates.std() < 1.2
    together = [(part.T.astype(float) @ part) / N for part in (fires, expected)]
    upper = np.triu_indices(SMALL.n_features, 1)
    pairs = z_scores(together[0][upper], together[1][upper], N)
    assert np.abs(pairs).max() < 5
    assert 0.9 < pairs.std() < 1.1
    means = [part.sum(0) / (part > 0).sum(0) for part in (ours, direct)]
    squares = [(part**2).sum(0) / (part > 0).sum(0) for part in (ours, direct)]
    counts = [(part > 0).sum(0) for part in (ours, direct)]
    errors = sum((square - mean**2) / count for square, mean, count in zip(squares, means, counts, strict=True))
    assert np.abs((means[0] - means[1]) / np.sqrt(errors)).max() < 4.5
    per_row = [part.sum(1) for part in (fires, expected)]
    assert abs(per_row[0].mean() - per_row[1].mean()) < 4 * math.sqrt(2 / N) * per_row[1].std()
    assert abs(per_row[0].std() / per_row[1].std() - 1) < 0.05


def test_a_seed_gives_the_same_rows_and_another_seed_others():
    sampler = Sampler(make_truth(SMALL))
    first, again, other = sampler.rows(300, 5), sampler.rows(300, 5), sampler.rows(300, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_are_sums_of_directions():
    truth = make_truth(SMALL)
    sampler = Sampler(truth)
    firing = sampler.fire(50, 1)
    values = torch.from_numpy(dense(firing, 50, SMALL.n_features))
    expected = values @ truth.vectors.double() + truth.bias.double()
    torch.testing.assert_close(sampler.activations(firing, 50).double(), expected, atol=1e-5, rtol=1e-5)
    assert firing.row.diff().min() >= 0
    assert (firing.magnitude > 0).all()


@pytest.mark.parametrize("n_features", [3, 20, 39, 41, 1024])
def test_trees_are_numbered_level_by_level_until_the_features_run_out(n_features):
    law = replace(SMALL, n_features=n_features)
    forest, children = make_forest(law), children_of(law)
    for node, group in children.items():
        assert int(forest.n_children[node]) == len(group)
        assert [int(forest.parent[child]) for child in group] == [node] * len(group)
        if group:
            assert int(forest.first_child[node]) == group[0]
    assert forest.in_tree == min(n_features, 3 + 9 + 27)


def test_probabilities_are_raised_by_the_parent_and_the_siblings():
    plain = firing_probabilities(replace(SMALL, compensate_probabilities=False)).numpy()
    raised = firing_probabilities(SMALL).numpy()
    assert plain[0] == pytest.approx(0.5)
    assert plain[-1] == pytest.approx(0.01)
    for parent, group in children_of(SMALL).items():
        for child in group:
            others = sum(plain[other] for other in group if other != child)
            factor = (1 + others / plain[parent]) / plain[parent]
            assert raised[child] == pytest.approx(min(1, plain[child] * factor))
    assert raised[39:] == pytest.approx(plain[39:])


def test_directions_follow_adam_on_the_pairwise_loss():
    torch.manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(40, 12, dtype=torch.float64), dim=1)
    vectors = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        dots = vectors @ vectors.T
        own = dots.diagonal()
        (dots.square().sum() - own.square().sum() + len(vectors) * (own - 1).square().sum()).backward()
        optimizer.step()
    expected = torch.nn.functional.normalize(vectors.detach(), dim=1)
    torch.testing.assert_close(orthogonalise(start, 20, 0.01), expected, atol=1e-9, rtol=0)
    before, after = (((part @ part.T) ** 2).sum() for part in (start, expected))
    assert after < before


def test_the_truth_is_read_back():
    truth = make_truth(SMALL)
    again = read_truth({"n_features": 160, "d_in": 16, "seed": 7}, truth.to_bytes())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(truth[1:], again[1:], strict=True))
    with pytest.raises(ValueError, match="vectors of shape"):
        read_truth({"n_features": 161, "d_in": 16}, truth.to_bytes())


def test_an_unknown_law_is_named():
    assert find_law("synthetic:synth-1k") is LAWS["synth-1k"]
    with pytest.raises(ConfigError, match="no synthetic law 'synth-2k'; expected one of synth-16k, synth-1k"):
        find_law("synthetic:synth-2k")
    with pytest.raises(ConfigError, match="must be below"):
        SyntheticLaw(n_features=2, d_in=2, min_probability=0.5, max_probability=0.5)
