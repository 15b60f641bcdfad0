"""Per-latent statistics against NumPy, by the dense and by the sparse path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thresher.evaluate.metrics.latent_sums import DENSITY_EDGES, LatentSums, density_summary


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(97, 23, generator=generator) - 1).relu()
    values[:, 5] = 0
    return values


def sparse(latents):
    """All entries, in another order and padded with zeros at latent 0."""
    top_acts, top_indices = latents.topk(int((latents > 0).sum(1).max()), dim=1, sorted=False)
    return top_acts, torch.where(top_acts > 0, top_indices, 0)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_statistics(latents, path):
    sums = LatentSums(23)
    for part in latents.split(40):
        if path == "dense":
            sums.add_dense(part, (part > 0).float())
        else:
            sums.add_sparse(*sparse(part))
    values = latents.numpy().astype(np.float64)
    fires = values > 0
    np.testing.assert_array_equal(sums.firings, fires.sum(0))
    np.testing.assert_allclose(sums.density, fires.mean(0))
    np.testing.assert_allclose(sums.max_activation, values.max(0))
    expected = np.array([column[column > 0].mean() if column.any() else np.nan for column in values.T])
    np.testing.assert_allclose(sums.mean_activation, expected, rtol=1e-6)
    assert sums.n_rows == 97
    assert density_summary(sums.density)["dead_fraction"] == pytest.approx(1 / 23)


def test_histogram_counts_every_live_latent_once():
    density = np.array([0, 0, 1e-12, 1e-8, 0.01, 0.0100001, 0.5, 1.0])
    summary = density_summary(density)
    histogram = summary["density_histogram"]
    assert sum(histogram["counts"]) == 6
    assert histogram["counts"][0] == 2
    assert histogram["counts"][-1] == 1
    assert histogram["edges"] == DENSITY_EDGES.tolist()
    assert summary["dead_fraction"] == 0.25


def test_no_rows():
    sums = LatentSums(4)
    sums.add_dense(torch.zeros(0, 4), torch.zeros(0, 4))
    assert sums.density.tolist() == [0, 0, 0, 0]
