"""Decode, gradients of values and of weights, against the references and against autograd in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from thresher.shared.store.format.codecs import dequantise_rows as store_dequantise
from thresher.train.kernels import cpu, reference
from thresher.train.kernels import triton as fused
from thresher.train.kernels.triton.csc import to_csc
from thresher.train.kernels.triton.token_major import MAX_AT_ONCE


def sparse(device, counts, d_sae, d_in, dtype=torch.float32, hot=None):
    """Return CSR latents with `counts` entries in each row, and decoder, inputs and bias."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.cat([torch.randperm(d_sae - 1, generator=generator)[:n] for n in counts])
    offsets = torch.tensor([0, *counts]).cumsum(0)
    if hot is not None:
        indices[offsets[:-1]] = hot
    values = torch.randn(len(indices), generator=generator)
    W_dec = torch.randn(d_sae, d_in, generator=generator).to(dtype)
    x = torch.randn(len(counts), d_in, generator=generator).to(dtype)
    b_dec = torch.randn(d_in, generator=generator)
    return tuple(tensor.to(device) for tensor in (values, indices.int(), offsets, W_dec, x, b_dec))


SHAPES = [
    pytest.param([1], 20, 16, torch.float32, id="one row, k=1"),
    pytest.param([3, 0, 19, 1], 20, 80, torch.float32, id="ragged, an empty row, d_in=80"),
    pytest.param([2, 2, 2], 20, 130, torch.bfloat16, id="bfloat16, d_in past a power of two"),
    pytest.param([2, 5], 20, 1100, torch.bfloat16, id="bfloat16, a row of two parts"),
]


@pytest.mark.parametrize(("counts", "d_sae", "d_in", "dtype"), SHAPES)
def test_ops_equal_the_references(device, counts, d_sae, d_in, dtype):
    values, indices, offsets, W_dec, g, _ = sparse(device, counts, d_sae, d_in, dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    x_hat = fused.decode(values, indices, offsets, W_dec)
    torch.testing.assert_close(x_hat, reference.decode(values, indices, offsets, W_dec), **tolerance)
    by_values = fused.grad_values(g, W_dec, indices, offsets)
    torch.testing.assert_close(by_values, reference.grad_values(g, W_dec, indices, offsets), **tolerance)
    by_weights = fused.grad_weights(values, indices, offsets, g, d_sae)
    expected = reference.grad_weights(values, indices, offsets, g, d_sae)
    torch.testing.assert_close(by_weights, expected, **tolerance)
    # The last latent is in no row.
    assert (by_weights[-1] == 0).all()


@pytest.mark.parametrize(("counts", "d_sae", "d_in", "dtype"), SHAPES)
def test_references_are_autograds(counts, d_sae, d_in, dtype):
    values, indices, offsets, W_dec, g, _ = sparse("cpu", counts, d_sae, d_in, dtype)
    values, W_dec, g = (t.double().requires_grad_() for t in (values, W_dec, g))
    dense = torch.zeros(len(counts), d_sae, dtype=torch.float64)
    dense = dense.index_put((reference.rows_of(offsets, len(values)), indices.long()), values)
    (dense @ W_dec * g).sum().backward()
    torch.testing.assert_close(reference.decode(values, indices, offsets, W_dec), dense @ W_dec)
    torch.testing.assert_close(reference.grad_values(g, W_dec, indices, offsets), values.grad)
    torch.testing.assert_close(reference.grad_weights(values, indices, offsets, g, d_sae), W_dec.grad)


@pytest.mark.parametrize("max_segment", [2, 3, 100])
def test_a_hot_latent_is_split_and_summed(device, max_segment):
    values, indices, offsets, _, g, _ = sparse(device, [2] * 7, 9, 16, hot=5)
    csc = to_csc(indices, offsets, 9, max_segment)
    by_weights, by_bias = fused.grad_weights_and_bias(values, indices, offsets, g, 9, csc)
    expected = reference.grad_weights(values, indices, offsets, g, 9)
    torch.testing.assert_close(by_weights, expected, rtol=1e-5, atol=1e-5)
    assert by_bias[5].item() == pytest.approx(values[indices == 5].sum().item(), abs=1e-5)
    assert torch.equal(by_weights, fused.grad_weights(values, indices, offsets, g, 9, csc))


def test_csc_leaves_out_what_is_past_the_last_row(device):
    indices = torch.tensor([2, 0, 2, 1, 1], dtype=torch.int32, device=device)
    csc = to_csc(indices, torch.tensor([0, 1, 1, 3], device=device), 4, max_segment=1)
    assert csc.starts.tolist() == [0, 1, 1, 3, 3]
    assert csc.order[:3].tolist() == [1, 0, 2]
    assert csc.rows[:3].tolist() == [2, 0, 2]


@pytest.mark.parametrize("d_sae", [3, 300, 65_535, 65_536, 131_072])
def test_csc_is_numpys_stable_sort(device, d_sae):
    """With keys of 16 bits and of 32, the first and last latents, empty rows and more entries than a block."""
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 5, 300)
    counts[[0, 7, -1]] = 0
    offsets = np.concatenate([[0], np.cumsum(counts)])
    used, nnz = offsets[-1], offsets[-1] + 20
    indices = generator.integers(0, d_sae, nnz)
    indices[:40:2], indices[1:40:2] = d_sae - 1, 0
    csc = to_csc(torch.tensor(indices, device=device), torch.tensor(offsets, device=device), d_sae)
    order = np.argsort(indices[:used], kind="stable")
    assert csc.order[:used].tolist() == order.tolist()
    assert csc.rows[:used].tolist() == np.repeat(np.arange(300), counts)[order].tolist()
    assert csc.starts.tolist() == np.searchsorted(indices[:used][order], np.arange(d_sae + 1)).tolist()
    assert csc.keys.dtype == (torch.int16 if d_sae < 65_536 else torch.int32)


def test_no_entries_are_sorted_and_summed_to_zero(device):
    none, offsets = torch.zeros(0, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    csc = to_csc(none.int(), offsets, 5)
    assert csc.starts.tolist() == [0] * 6
    by_weights, by_bias = fused.grad_weights_and_bias(
        none, none.int(), offsets, torch.ones(2, 4, device=device), 5, csc
    )
    assert not by_weights.any()
    assert not by_bias.any()


@pytest.mark.parametrize(
    ("batch", "k", "d_in", "dtype"),
    [
        pytest.param(1, 1, 16, torch.float32, id="one row, k=1"),
        pytest.param(3, 19, 300, torch.float32, id="channels in turns"),
        pytest.param(4, 3, 130, torch.bfloat16, id="bfloat16, d_in past a power of two"),
        pytest.param(2, MAX_AT_ONCE + 1, 16, torch.bfloat16, id="more than are held at once"),
    ],
)
def test_reconstruct_is_the_loss_and_its_gradients(device, batch, k, d_in, dtype):
    values, indices, offsets, W_dec, x, b_dec = sparse(device, [k] * batch, k + 2, d_in, dtype)
    values[::3] = 0.0
    scale = 2 / batch
    found = fused.reconstruct(values, indices, W_dec, b_dec, x, scale)

    pre_acts = values.double().requires_grad_()
    x_hat = reference.decode(pre_acts, indices, offsets, W_dec.double()) + b_dec
    x_hat.retain_grad()
    squared_error = (x_hat - x.double()).square().sum(1)
    squared_error.mean().backward()
    torch.testing.assert_close(found.squared_error.double(), squared_error, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.g.double(), x_hat.grad, rtol=1e-4, atol=1e-4)
    # A latent that ReLU holds at zero, or one that is negative, passes nothing on.
    expected = torch.where(values > 0, pre_acts.grad, 0.0)
    torch.testing.assert_close(found.grad_pre_acts.double(), expected, rtol=1e-4, atol=1e-3)
    assert found.n_active.tolist() == (values > 0).view(batch, k).sum(1).tolist()
    ends = offsets.tolist()
    assert found.n_active.tolist() == [int((values[a:b] > 0).sum()) for a, b in itertools.pairwise(ends)]


def test_rows_start_beyond_what_32_bits_can_address(device):
    """A decoder whose rows are just over 2^30 elements apart; memory that is not touched costs nothing."""
    stride, d_in = (1 << 30) + 16, 16
    storage = torch.zeros(1, dtype=torch.bfloat16, device=device).new_empty(2 * stride + d_in)
    W_dec = storage.as_strided((3, d_in), (stride, 1))
    W_dec.copy_(torch.arange(3.0)[:, None].expand(3, d_in))
    offsets = torch.tensor([0, 2], device=device)
    indices = torch.tensor([2, 1], dtype=torch.int32, device=device)
    values = torch.tensor([1.0, 10.0], device=device)
    assert (fused.decode(values, indices, offsets, W_dec) == 12.0).all()
    by_values = fused.grad_values(torch.ones(1, d_in, device=device), W_dec, indices, offsets)
    assert by_values.tolist() == [32.0, 16.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_gathered_and_dequantised_as_the_store_does(device, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-96, 97, (7, 80), generator=generator, dtype=torch.int8)
    scales, places = torch.rand(7, generator=generator), torch.tensor([6, 0, 3, 3])
    expected = torch.from_numpy(store_dequantise(values.numpy(), scales.numpy()))[places].to(device)
    found = fused.dequantise(values.to(device), scales.to(device), places.to(device), dtype)
    assert found.dtype == dtype
    # The interpreter truncates where the GPU rounds.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=0)
    assert len(fused.dequantise(values.to(device), scales.to(device), places[:0].to(device), dtype)) == 0


@pytest.mark.parametrize("d_in", [1, 80, 1300])
def test_rows_are_normalised_as_the_reference_does(device, d_in):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 2 * d_in, generator=generator).bfloat16().to(device)[:, :d_in]
    mean = torch.randn(d_in, generator=generator).to(device)
    x, x_compute = fused.normalise(rows, mean, 0.3)
    torch.testing.assert_close(x, reference.normalise(rows, mean, 0.3)[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(x_compute.float(), x, rtol=2**-7, atol=0)
    x, x_compute = fused.normalise(rows, mean, 0.3, torch.float32)
    assert x_compute is x


@pytest.mark.parametrize("kernels", [cpu, fused])
def test_sums_by_latent_are_the_references(kernels):
    generator = torch.Generator().manual_seed(0)
    values, g = torch.randn(9, generator=generator), torch.randn(4, 5, generator=generator)
    indices = torch.randint(0, 6, (9,), generator=generator)
    offsets = torch.tensor([0, 2, 2, 8, 9])
    expected = reference.grad_weights_and_bias(values, indices, offsets, g, 7)
    found = kernels.grad_weights_and_bias(values, indices, offsets, g, 7)
    torch.testing.assert_close(found, expected)
    assert (found[1][6], expected[1][6]) == (0, 0)
    csc = kernels.to_csc(indices, offsets, 7)
    torch.testing.assert_close(kernels.sum_by_latent(values, indices, offsets, 7, csc), expected[1])
    torch.testing.assert_close(reference.sum_by_latent(values, indices, offsets, 7), expected[1])
