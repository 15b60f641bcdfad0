"""Every kernel at its edges: ties, one row, not a number, addresses past 2^31, the same bits twice."""

from __future__ import annotations

import math

import pytest
import torch

import thresher.train.kernels.triton.adam as update_module
from thresher.train.kernels import reference
from thresher.train.kernels import triton as fused
from thresher.train.kernels.triton.csc import to_csc
from thresher.train.kernels.triton.select import SelectTiling, select_topk_certified
from thresher.train.kernels.triton.threshold import ThresholdTiling

SMALL = SelectTiling(n_candidates=2, rows=16, latents=16, d=16, redo_latents=16)
SMALL_THRESHOLD = ThresholdTiling(n_slots=2, rows=16, latents=16, d=16)


def whole_numbers(device, batch, d_sae, d_in, dtype):
    """Return inputs, weights and a bias of which every product is exact, and of few different values."""
    generator = torch.Generator().manual_seed(0)
    x, W_enc, b_enc = (
        torch.randint(-2, 3, shape, generator=generator).to(device)
        for shape in ((batch, d_in), (d_sae, d_in), (d_sae,))
    )
    return x.to(dtype), W_enc.to(dtype), b_enc.float()


def far_apart(tensor):
    """Return a copy whose last row starts just past 2^31 elements, by a stride below; the gaps cost no memory."""
    stride = (1 << 31) // (len(tensor) - 1) + 16
    storage = tensor.new_zeros(1).new_empty((len(tensor) - 1) * stride + tensor.shape[1])
    return storage.as_strided(tensor.shape, (stride, 1)).copy_(tensor)


def assert_same(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def in_order(top_acts, top_indices):
    """Return a selection in descending order, of which ties begin with the lower latent."""
    top_indices, order = top_indices.long().sort(dim=1)
    top_acts, by_value = top_acts.gather(1, order).sort(dim=1, descending=True, stable=True)
    return top_acts, top_indices.gather(1, by_value)


EXACT = [
    pytest.param(1, 37, 80, torch.float32, id="one row"),
    pytest.param(5, 70, 16, torch.bfloat16, id="bfloat16"),
]


@pytest.mark.parametrize(("batch", "d_sae", "d_in", "dtype"), EXACT)
@pytest.mark.parametrize("k", [1, 4])
def test_topk_with_many_ties_is_that_of_a_stable_sort(device, batch, d_sae, d_in, dtype, k):
    x, W_enc, b_enc = whole_numbers(device, batch, d_sae, d_in, dtype)
    pre_acts = reference.pre_activations(x, W_enc, b_enc)
    expected = pre_acts.sort(dim=1, descending=True, stable=True)
    assert (expected.values[:, :-1] == expected.values[:, 1:]).any(), "there are ties"
    top_acts, top_indices, _ = select_topk_certified(x, W_enc, b_enc, k, SMALL)
    assert_same(in_order(top_acts, top_indices), (expected.values[:, :k], expected.indices[:, :k]))


@pytest.mark.parametrize(("batch", "d_sae", "d_in", "dtype"), EXACT)
def test_what_equals_the_threshold_is_not_above_it(device, batch, d_sae, d_in, dtype):
    x, W_enc, b_enc = whole_numbers(device, batch, d_sae, d_in, dtype)
    pre_acts = reference.pre_activations(x, W_enc, b_enc)
    threshold = pre_acts[0] + (torch.arange(d_sae, device=device) % 3 - 1)
    assert (pre_acts == threshold).any()
    assert ((pre_acts > threshold).view(batch, -1)[:, :16].sum(1) > SMALL_THRESHOLD.n_slots).any()
    found = fused.select_threshold(x, W_enc, b_enc, threshold, tiling=SMALL_THRESHOLD)
    assert_same(found, reference.select_threshold(x, W_enc, b_enc, threshold))
    assert_same(found, fused.select_threshold(x, W_enc, b_enc, threshold, tiling=SMALL_THRESHOLD))


@pytest.mark.parametrize(("batch", "d_sae", "d_in", "dtype"), EXACT)
@pytest.mark.parametrize("k", [1, 5])
def test_batch_topk_with_many_ties_equals_the_reference(device, batch, d_sae, d_in, dtype, k):
    x, W_enc, b_enc = whole_numbers(device, batch, d_sae, d_in, dtype)
    expected, expected_least = reference.select_batch_topk(x, W_enc, b_enc, k)
    floor = expected_least - 1
    found, least, certified = fused.select_batch_topk(x, W_enc, b_enc, k, floor, batch * d_sae, SMALL_THRESHOLD)
    assert certified
    assert len(expected[0]) == batch * k
    assert_same(found, expected)
    assert least == expected_least


def test_latents_past_the_last_are_never_chosen(device):
    """Were they the last one again, without its bias, they would be the largest."""
    x, W_enc, b_enc = whole_numbers(device, 2, 37, 16, torch.float32)
    W_enc[-1], b_enc[-1] = 50 * x[0], -1e6
    expected = reference.pre_activations(x, W_enc, b_enc).sort(dim=1, descending=True, stable=True)
    top_acts, top_indices, _ = select_topk_certified(x, W_enc, b_enc, 4, SMALL)
    assert_same(in_order(top_acts, top_indices), (expected.values[:, :4], expected.indices[:, :4]))
    found = fused.select_threshold(x, W_enc, b_enc, 0.0, tiling=SMALL_THRESHOLD)
    assert_same(found, reference.select_threshold(x, W_enc, b_enc, 0.0))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_row_that_is_not_a_number_stays_so_and_no_other_is(device, sign):
    x, W_enc, b_enc = whole_numbers(device, 3, 37, 16, torch.float32)
    expected = select_topk_certified(x, W_enc, b_enc, 2, SMALL)[0]
    x[1, 5] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    top_acts, top_indices, _ = select_topk_certified(x, W_enc, b_enc, 2, SMALL)
    assert top_acts[1].isnan().all()
    assert torch.equal(top_acts[[0, 2]], expected[[0, 2]])
    assert ((top_indices >= 0) & (top_indices < 37)).all()


def test_selections_read_beyond_what_32_bits_can_address(device):
    """Latent 17 and row 2 lie past 2^31 elements; four of the first tile's latents fail the certificate."""
    x, W_enc, b_enc = whole_numbers(device, 3, 18, 16, torch.bfloat16)
    b_enc[[3, 5, 7, 9]] += 300.0
    b_enc[17] += 400.0
    far_x, far_W = far_apart(x), far_apart(W_enc)
    expected = select_topk_certified(x, W_enc, b_enc, 4, SMALL)
    assert expected[2].all()
    assert set(expected[1][0].tolist()) < {3, 5, 7, 9, 17}
    assert (expected[1] == 17).any(1).all()
    assert_same(select_topk_certified(far_x, far_W, b_enc, 4, SMALL), expected)
    found = fused.select_threshold(far_x, far_W, b_enc, 0.0, tiling=SMALL_THRESHOLD)
    assert_same(found, reference.select_threshold(x, W_enc, b_enc, 0.0))


def test_rows_of_gradients_and_stores_start_beyond_what_32_bits_can_address(device):
    generator = torch.Generator().manual_seed(0)
    values, rows = torch.randn(6, generator=generator).to(device), torch.randn(3, 16, generator=generator).to(device)
    indices = torch.tensor([0, 1, 2, 2, 1, 2], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, 2, 4, 6], device=device)
    W_dec, far = torch.randn(3, 16, generator=generator).to(device), far_apart(rows.bfloat16())
    near, b_dec, scale = far.contiguous(), rows[0], 1.0
    csc = to_csc(indices, offsets, 3, max_segment=1)
    for matrix in (csc, None):
        by_weights = fused.grad_weights(values, indices, offsets, far, 3, matrix)
        assert torch.equal(by_weights, fused.grad_weights(values, indices, offsets, near, 3, matrix))
    found = fused.reconstruct(values, indices, W_dec, b_dec, far, scale)
    assert_same(found, fused.reconstruct(values, indices, W_dec, b_dec, near, scale))
    assert_same(fused.normalise(far, b_dec, 0.5), fused.normalise(near, b_dec, 0.5))
    stored, places = near.to(torch.int8), torch.tensor([2, 0, 1], device=device)
    again = fused.dequantise(far_apart(stored), values[:3], places, torch.float32)
    assert torch.equal(again, fused.dequantise(stored, values[:3], places, torch.float32))


def latents_of(device, batch, d_sae, k, d_in):
    """Return TopK's entries, of which one latent is in every row and one in none, and what a step has of them."""
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(d_sae - 2, generator=generator)[: k - 1] + 1 for _ in range(batch)]
    indices = torch.cat([torch.cat([torch.zeros(1), part]) for part in chosen]).int()
    values = torch.randn(batch * k, generator=generator).abs()
    matrices = (torch.randn(n, d_in, generator=generator) for n in (batch, batch, d_sae, d_sae))
    offsets = torch.arange(0, batch * k + 1, k)
    return tuple(tensor.to(device) for tensor in (values, indices, offsets, *matrices))


@pytest.mark.parametrize(("batch", "k", "d_in"), [(1, 1, 80), (1, 4, 16), (6, 3, 80)])
def test_reconstruct_equals_the_reference_twice(device, batch, k, d_in):
    values, indices, _, x, _, W_dec, _ = latents_of(device, batch, 9, k, d_in)
    values[-1] = 0.0
    arguments = (values, indices, W_dec, x[0] * 0.1, x, 0.3)
    found, expected = fused.reconstruct(*arguments), reference.reconstruct(*arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert_same(found, fused.reconstruct(*arguments))


@pytest.mark.parametrize(("batch", "k", "d_in"), [(1, 1, 80), (6, 3, 600)])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("dense", [False, True])
def test_update_equals_the_reference_twice(device, monkeypatch, batch, k, d_in, max_norm, dense):
    """With dense gradients of latents that have many entries, some or none."""
    values, indices, offsets, x, g, W_dec, W_enc = latents_of(device, batch, 9, k, d_in)
    csc = to_csc(indices, offsets, 9, max_segment=2)
    extra = None
    if dense:
        slots = torch.full((9,), -1, dtype=torch.int32, device=device)
        slots[torch.tensor([7, 0, 3], device=device)] = torch.arange(3, dtype=torch.int32, device=device)
        extra = fused.DenseGradients(slots, W_dec[:3].flip(1), W_enc[:3].flip(1), W_enc[:3, 5].contiguous())
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    by_pre_acts, values = values.flip(0), values.clone()
    values[indices == indices[1 % len(indices)]] = 0.0

    def after(update):
        states = [fused.AdamState.of(weight) for weight in (W_enc, W_enc[:, 0], W_dec, 0.5 * x[0])]
        schedule = torch.tensor([0.01, 0.1, 0.001, 1.0], device=device)
        hyperparameters = fused.Hyperparameters(schedule, eps=1e-4, decoder_lr_scale=2.5)
        since = torch.arange(9, device=device)
        counters = fused.LatentCounters(since, torch.full((), 77, dtype=torch.int32, device=device), 7 + batch)
        norms = [
            update(values, by_pre_acts, csc, x, g, *states, hyperparameters, counters, max_norm, extra)
            for _ in range(2)
        ]
        tensors = [getattr(state, name) for state in states for name in ("weight", "mean", "square")]
        return [*tensors, schedule, *(norm.float() for norm in norms if norm is not None), *counters[:2]], states

    # Programs take latents in turn: four, so that the last has one.
    monkeypatch.setattr(update_module, "GROUP", 4)
    (found, states), (expected, _) = after(fused.update), after(reference.update)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    fires = torch.zeros(9, dtype=torch.bool, device=device)
    fires[indices[values > 0].long()] = True
    assert torch.equal(found[-2], (torch.arange(9, device=device) + 2 * batch) * ~fires)
    assert found[-1] == 2 - int(fires[7]) - int(fires[8]), "7 and 8 are dead before the second step unless they fire"
    assert not torch.equal(states[0].weight, W_enc)
    assert torch.equal(states[0].mean[-1], torch.zeros(d_in, device=device)), "an unused latent has no gradient"
    assert_same(found, after(fused.update)[0])


def test_every_op_gives_the_same_bits_twice(device):
    values, indices, offsets, x, g, W_dec, _ = latents_of(device, 6, 9, 3, 80)
    csc = to_csc(indices, offsets, 9, max_segment=2)
    stored = (8 * g).to(torch.int8)
    calls = (
        lambda: (fused.decode(values, indices, offsets, W_dec),),
        lambda: (fused.grad_values(x, W_dec, indices, offsets),),
        lambda: fused.grad_weights_and_bias(values, indices, offsets, x, 9, csc),
        lambda: fused.normalise(x, g[0], 0.5),
        lambda: (fused.dequantise(stored, values[:6], indices.long() % 6),),
        lambda: to_csc(indices, offsets, 9)[:4],
    )
    for call in calls:
        assert_same(call(), call())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_wider_than_a_block_are_dequantised_and_normalised(device, dtype):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-127, 128, (3, 1100), generator=generator, dtype=torch.int8).to(device)
    scales, places = torch.rand(3, generator=generator).to(device), torch.tensor([2, 0, 2, 1], device=device)
    mean = torch.randn(1100, generator=generator).to(device)
    # The interpreter truncates where the GPU rounds.
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-6, "atol": 1e-6}
    found = fused.dequantise(stored, scales, places, dtype)
    torch.testing.assert_close(found, reference.dequantise(stored, scales, places, dtype), **tolerance)
    norms = ((found.float() - mean) * 0.3).norm(dim=1)
    for max_norm in (math.inf, float(norms.median())):
        x, x_compute = fused.normalise(found, mean, 0.3, dtype, max_norm)
        expected, expected_compute = reference.normalise(found, mean, 0.3, dtype, max_norm)
        torch.testing.assert_close(x, expected, **tolerance)
        torch.testing.assert_close(x_compute, expected_compute, **tolerance)
        assert bool((x.norm(dim=1) <= 1.0001 * max_norm).all())
        assert bool((norms > max_norm).any()) == math.isfinite(max_norm)
