"""Reconstruction metrics against float64 NumPy, in one go and in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.evaluate.metrics.bootstrap import point_estimates
from thresher.evaluate.metrics.reconstruction import InputSums, ReconstructionSums, reconstruction_metrics


def reference(x, x_hat, latents):
    """Every metric from all rows at once, in float64, straight from its definition."""
    x, x_hat, latents = (np.asarray(a, dtype=np.float64) for a in (x, x_hat, latents))
    norm_in, norm_out = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    mse = np.mean(np.sum((x - x_hat) ** 2, axis=1))
    fvu = mse / np.sum(np.var(x, axis=0))
    return {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "mse": mse,
        "cossim": np.mean(np.sum(x * x_hat, axis=1) / (norm_in * norm_out)),
        "l2_ratio": np.mean(norm_out / norm_in),
        "relative_reconstruction_bias": np.mean(norm_out**2) / np.mean(np.sum(x * x_hat, axis=1)),
        "l0": np.mean(np.sum(latents != 0, axis=1)),
        "l1": np.mean(np.sum(np.abs(latents), axis=1)),
    }


def measured(x, x_hat, latents, group, n_groups, pieces=1):
    inputs, sums = InputSums(n_groups, x.shape[1]), ReconstructionSums(n_groups)
    for part in torch.arange(len(x)).tensor_split(pieces):
        l0, l1 = (latents[part] != 0).sum(1).float(), latents[part].abs().sum(1)
        inputs.add(x[part], group[part])
        sums.add(x[part], x_hat[part], l0, l1, group[part])
    return inputs.sums() | sums.sums()


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(203, 37, generator=generator) * torch.linspace(0.1, 4, 37) + 3
    x_hat = x + 0.3 * torch.randn(203, 37, generator=generator)
    latents = torch.randn(203, 91, generator=generator).relu()
    group = torch.randint(0, 6, (203,), generator=generator)
    return x, x_hat, latents, group


def test_metrics_are_their_definitions(rows):
    x, x_hat, latents, group = rows
    result = point_estimates(reconstruction_metrics, measured(x, x_hat, latents, group, 6))
    for name, expected in reference(x, x_hat, latents).items():
        assert result[name] == pytest.approx(expected, rel=1e-6), name


@settings(max_examples=20, deadline=None)
@given(pieces=st.integers(1, 9), n_groups=st.integers(1, 5))
def test_pieces_and_groups_do_not_matter(pieces, n_groups):
    generator = torch.Generator().manual_seed(pieces)
    x, x_hat = torch.randn(2, 31, 5, generator=generator)
    latents = torch.randn(31, 7, generator=generator).relu()
    group = torch.randint(0, n_groups, (31,), generator=generator)
    whole = point_estimates(reconstruction_metrics, measured(x, x_hat, latents, torch.zeros_like(group), 1))
    split = point_estimates(reconstruction_metrics, measured(x, x_hat, latents, group, n_groups, pieces))
    assert split == pytest.approx(whole, rel=1e-9)


def test_a_mean_far_from_zero_does_not_cost_the_variance():
    """A residual stream's variance may be a millionth of its squared norm; float32 sums would lose it."""
    generator = torch.Generator().manual_seed(1)
    x = 3000 + torch.randn(4096, 16, generator=generator)
    x_hat = x + 0.5 * torch.randn(4096, 16, generator=generator)
    group = torch.zeros(4096, dtype=torch.int64)
    result = point_estimates(reconstruction_metrics, measured(x, x_hat, x, group, 1))
    assert result["explained_variance"] == pytest.approx(reference(x, x_hat, x)["explained_variance"], rel=1e-6)


def pooled(x, x_hat, group):
    return point_estimates(reconstruction_metrics, measured(x, x_hat, x, group, 2, pieces=2))["explained_variance"]


def check_explained_variance_is_pooled(explained_variance):
    """Two blocks of different mean: within-block variance alone would make the score too low."""
    x = torch.cat([torch.randn(64, 4), 50 + torch.randn(64, 4)])
    x_hat = x + 1
    found = explained_variance(x, x_hat, torch.arange(128) // 64)
    assert found == pytest.approx(reference(x, x_hat, x)["explained_variance"], rel=1e-6)
    assert found > 0.99


def test_explained_variance_is_pooled_not_averaged_over_blocks():
    check_explained_variance_is_pooled(pooled)


@pytest.mark.parametrize("mistake", ["a mean over blocks", "scaled against unscaled"])
def test_an_explained_variance_of_other_rows_is_noticed(mistake):
    """The seventh of the mistakes that `tests/train/architectures/test_fifteen_mistakes.py` lists."""

    def mistaken(x, x_hat, group):
        if mistake == "scaled against unscaled":
            return pooled(x * 3, x_hat, group)
        return sum(pooled(x[group == i], x_hat[group == i], group[group == i]) for i in (0, 1)) / 2

    with pytest.raises(AssertionError):
        check_explained_variance_is_pooled(mistaken)


def test_perfect_and_constant_rows_give_numbers_that_json_can_hold():
    x = torch.ones(8, 3)
    group = torch.zeros(8, dtype=torch.int64)
    constant = point_estimates(reconstruction_metrics, measured(x, x, x, group, 1))
    assert constant["explained_variance"] is None
    assert constant["mse"] == 0
    zero = torch.zeros(8, 3)
    nothing = point_estimates(reconstruction_metrics, measured(zero, zero, zero, group, 1))
    assert nothing["cossim"] == 0
    assert nothing["l2_ratio"] == 0
    assert nothing["relative_reconstruction_bias"] is None
