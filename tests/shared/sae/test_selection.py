"""The k largest entries by way of group maxima, against a full sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thresher.shared.sae import Sae
from thresher.shared.sae.selection import active_entries, largest


def check(pre_acts, k):
    values, indices = largest(pre_acts, k)
    assert values.shape == indices.shape == (len(pre_acts), k)
    np.testing.assert_array_equal(np.sort(values, axis=1), np.sort(pre_acts, axis=1)[:, pre_acts.shape[1] - k :])
    np.testing.assert_array_equal(pre_acts.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize(
    ("batch", "d_sae", "k"),
    [(7, 1000, 3), (1, 64, 8), (33, 513, 32), (5, 129, 16), (4, 20, 20), (3, 100, 1), (0, 64, 4)],
)
def test_random_rows(batch, d_sae, k):
    check(torch.randn(batch, d_sae, generator=torch.Generator().manual_seed(d_sae)), k)


@pytest.mark.parametrize("rows", ["equal", "one group", "tail", "rising", "negative", "few values"])
def test_rows_that_groups_do_not_suit(rows):
    d_sae, k = 331, 5
    x = torch.zeros(6, d_sae)
    if rows == "one group":
        x[:, :: 2 * k] = torch.rand(6, x[:, :: 2 * k].shape[1])
    elif rows == "tail":
        x[:, -4:] = 3.0
    elif rows == "rising":
        x += torch.arange(d_sae)
    elif rows == "negative":
        x -= torch.rand(6, d_sae)
        x[0] = -torch.inf
    elif rows == "few values":
        x += torch.randint(0, 3, (6, d_sae))
    check(x, k)


def test_the_rows_between_the_strides_of_a_larger_matrix():
    wide = torch.randn(8, 700, generator=torch.Generator().manual_seed(0))
    check(wide[::2, 50:650], 6)


def test_not_a_number_counts_as_the_largest_as_in_torch():
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    x[1, 17] = torch.nan
    values, indices = largest(x, 4)
    assert 17 in indices[1].tolist()
    assert values[1].isnan().sum() == 1


def test_sparse_and_dense_encoding_agree():
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(600, 12, generator=generator)
    tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(600), "W_dec": W_dec, "b_dec": torch.randn(12)}
    sae = Sae("topk", tensors, config={"k": 9})
    x = torch.randn(50, 12, generator=generator)
    top_acts, top_indices = sae.encode_sparse(x)
    dense = torch.zeros(50, 600).scatter_(1, top_indices, top_acts)
    torch.testing.assert_close(dense, sae.encode(x), rtol=0, atol=0)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_active_entries_are_those_that_are_not_zero_and_indices_are_distinct(density):
    latents = torch.relu(torch.rand(64, 9, generator=torch.Generator().manual_seed(0)) + density - 1)
    acts, indices = active_entries(latents)
    assert indices.shape[1] == max(1, int((latents > 0).sum(1).max()))
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    restored = np.zeros((64, 9), dtype=np.float32)
    for row in range(64):
        for act, index in zip(acts[row].tolist(), indices[row].tolist(), strict=True):
            restored[row, index] = act
    assert np.array_equal(restored, latents.numpy())


def test_active_entries_keep_nan_gradients_and_empty_batches():
    latents = torch.tensor([[0.0, torch.nan, 0.0], [2.0, 0.0, 3.0]], requires_grad=True)
    acts, _ = active_entries(latents)
    assert acts[0].isnan().any()
    acts[1].sum().backward()
    assert latents.grad is not None
    assert latents.grad[1].tolist() == [1.0, 0.0, 1.0]
    assert active_entries(torch.zeros(0, 3))[1].shape == (0, 1)
