"""Entries found by groups against a search of all of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from thresher.train.kernels import cpu
from thresher.train.kernels.cpu.threshold import entries_at_least, largest_of_batch
from thresher.train.kernels.entries import DenseEntries, batch_threshold, entries_of


def sorted_within_rows(indices, offsets):
    return [sorted(indices[lo:hi].tolist()) for lo, hi in itertools.pairwise(offsets)]


def rows(dtype, positive, n_rows=9, d_sae=160, seed=0):
    """Return rows of which about a share is positive; one has none."""
    noise = torch.randn(n_rows, d_sae, generator=torch.Generator().manual_seed(seed))
    noise -= noise.quantile(1 - positive)
    noise[3] = -1.0
    return noise.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("floor", [None, 0.25, 100.0])
def test_entries_are_those_of_a_search_of_all(dtype, floor):
    pre_acts = rows(dtype, 0.04)
    floor = torch.finfo(dtype).smallest_normal if floor is None else floor
    found = entries_at_least(pre_acts, floor)
    assert sorted_within_rows(*found) == sorted_within_rows(*entries_of(pre_acts >= floor))


def test_where_most_groups_have_one_or_latents_do_not_group_another_way_is_asked_for():
    assert entries_at_least(rows(torch.bfloat16, 0.5), 1e-30) is None
    assert entries_at_least(rows(torch.bfloat16, 0.01, d_sae=161), 1e-30) is None
    assert entries_at_least(rows(torch.float64, 0.01), 1e-30) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("shape", [(9, 160), (300, 800)])
def test_the_batchs_largest_are_those_above_its_threshold(dtype, k, shape):
    """With k = 12 fewer are positive; the larger shape is sampled."""
    pre_acts = rows(dtype, 0.03, *shape)
    found = largest_of_batch(pre_acts, k * len(pre_acts))
    lowest = batch_threshold(pre_acts, k * len(pre_acts))
    assert sorted_within_rows(*found) == sorted_within_rows(*entries_of(pre_acts >= lowest))


def test_a_sample_that_misses_the_largest_is_made_up_for():
    """All large entries are outside the sample, so that its bound comes from the small ones."""
    pre_acts = torch.full((64, 4096), -1.0)
    pre_acts[:, 1::4] = 1.0
    pre_acts[:, ::1024] = 5.0
    found = largest_of_batch(pre_acts, 64 * 8)
    expected = entries_of(pre_acts >= batch_threshold(pre_acts, 64 * 8))
    assert found is None or sorted_within_rows(*found) == sorted_within_rows(*expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by_latent", [True, False])
def test_entries_of_a_product_are_those_of_all_pre_activations_block_by_block(dtype, by_latent):
    """Over several blocks of rows, of which one has no entry."""
    generator = torch.Generator().manual_seed(3)
    x, W, bias = (torch.randn(size, generator=generator) for size in ((1300, 24), (160, 24), (160,)))
    x[500:530] = 0
    bias -= 12
    threshold = torch.rand(160, generator=generator) - 1.5 if by_latent else -0.5
    found = cpu.Cpu().entries_above(x.to(dtype), W.to(dtype), bias, threshold, 1 / 16)
    exact = x.to(dtype).double() @ W.to(dtype).double().T + (bias - threshold).to(dtype).double()
    expected = entries_of(exact > 0)
    assert 0 < len(expected[0]) < x.shape[0] * 160 / 16
    assert sorted_within_rows(*found) == sorted_within_rows(*expected)


def test_a_product_with_many_entries_in_one_block_of_rows_is_refused():
    x, W = torch.zeros(1300, 8), torch.eye(8).repeat(20, 1)
    assert len(cpu.Cpu().entries_above(x, W, torch.full((160,), -1.0), 0.0, 1 / 16).indices) == 0
    x[1100] = 2.0
    assert len(cpu.Cpu().entries_above(x, W, torch.full((160,), -1.0), 0.0, 1 / 16).indices) == 160
    x[1100:] = 2.0
    assert isinstance(cpu.Cpu().entries_above(x, W, torch.full((160,), -1.0), 0.0, 1 / 16), DenseEntries)
