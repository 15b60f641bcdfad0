"""Selection in the GEMM's epilogue against a full sort of all pre-activations."""

from __future__ import annotations

import pytest
import torch

import thresher.train.kernels.triton.merge as merge_module
from thresher.train.kernels import reference
from thresher.train.kernels.triton.select import (
    MAX_RECOMPUTED,
    SelectTiling,
    padded_k,
    select_tiling,
    select_topk,
    select_topk_certified,
)
from thresher.train.kernels.triton.threshold import ThresholdTiling, batch_floor, select_batch_topk, select_threshold

SMALL = SelectTiling(n_candidates=2, rows=16, latents=32, d=32, redo_latents=32)
SMALL_THRESHOLD = ThresholdTiling(n_slots=4, rows=16, latents=32, d=32)


def encoder(device, batch, d_sae, d_in, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator).to(device, dtype)
    W_enc = torch.randn(d_sae, d_in, generator=generator).to(device, dtype)
    return x, W_enc, torch.randn(d_sae, generator=generator).to(device)


def assert_same_selection(x, W_enc, b_enc, k, top_acts, top_indices):
    """Hold every chosen value against its pre-activation in float64, and the row's values against a sort."""
    pre_acts = reference.pre_activations(x.double(), W_enc.double(), b_enc.double())
    expected = pre_acts.sort(dim=1, descending=True).values[:, :k].relu()
    torch.testing.assert_close(top_acts.double().sort(dim=1, descending=True).values, expected, rtol=1e-5, atol=1e-4)
    chosen = pre_acts.gather(1, top_indices.long()).relu()
    torch.testing.assert_close(top_acts.double(), chosen, rtol=1e-5, atol=1e-4)
    assert all(len(set(row)) == k for row in top_indices.tolist())


@pytest.mark.parametrize(
    ("batch", "d_sae", "d_in", "k", "dtype"),
    [
        pytest.param(1, 70, 16, 1, torch.float32, id="one row, k=1, d_sae no multiple of the tile"),
        pytest.param(5, 130, 80, 7, torch.float32, id="d_in=80, k no power of two"),
        pytest.param(17, 96, 48, 4, torch.bfloat16, id="bfloat16, rows past a block"),
    ],
)
def test_select_topk_equals_a_sort(device, batch, d_sae, d_in, k, dtype):
    x, W_enc, b_enc = encoder(device, batch, d_sae, d_in, dtype)
    tiling = SMALL._replace(n_candidates=4)
    top_acts, top_indices = select_topk(x, W_enc, b_enc, k, tiling)
    assert_same_selection(x, W_enc, b_enc, k, top_acts, top_indices)
    again = select_topk(x, W_enc, b_enc, k, tiling)
    assert torch.equal(top_acts, again[0])
    assert torch.equal(top_indices, again[1])


def test_rows_that_fail_the_certificate_are_recomputed(device):
    """All of row 1's largest latents lie in one tile, which lists two; row 0's are spread."""
    x, W_enc, b_enc = encoder(device, 2, 160, 16)
    W_enc[:, 0] = 0.0
    W_enc[64:70, 0] = 20.0
    x[:, 0] = torch.tensor([0.0, 3.0])
    b_enc[::32] += 30.0
    b_enc[64:70] -= 10.0
    top_acts, top_indices, failed = select_topk_certified(x, W_enc, b_enc, 5, SMALL)
    assert failed.tolist() == [0, 1]
    assert_same_selection(x, W_enc, b_enc, 5, top_acts, top_indices)


def test_ties_go_to_the_lower_latent(device):
    x = torch.ones(1, 16, device=device)
    W_enc = torch.zeros(64, 16, device=device)
    W_enc[[3, 9, 40, 41, 63]] = 1.0
    top_acts, top_indices, _ = select_topk_certified(x, W_enc, torch.zeros(64, device=device), 3, SMALL)
    assert top_acts.tolist() == [[16.0] * 3]
    assert sorted(top_indices[0].tolist()) == [3, 9, 40]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("held", [16_384, 16])
def test_values_of_bfloat16_are_rounded_to_what_a_key_holds_and_ties_go_to_the_lower_latent(
    device, monkeypatch, recomputed, held
):
    """A key of a tile of 32 latents has 5 bits fewer for a value: near 256 it counts in steps of 2^-10."""
    monkeypatch.setattr(merge_module, "MAX_HELD_KEYS", held)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 400, (96,), generator=generator)
    if recomputed:
        steps[40:46] = 401  # the five largest lie in one tile
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).repeat(1, 8).bfloat16()
    W_enc = torch.zeros(96, 16)
    W_enc[:, 0], W_enc[:, 1] = 256.0, 2.0**-13 * (steps % 16) - 2.0**-13 * 4
    bias = 2.0**-13 * (steps // 16 * 16)
    top_acts, top_indices, failed = select_topk_certified(
        x.to(device),
        W_enc.bfloat16().to(device),
        bias.to(device),
        5,
        SMALL._replace(n_candidates=2 if recomputed else 7),
    )
    assert failed.tolist() == [recomputed] * 2
    exact = x.double() @ W_enc.double().T + bias.double()
    rounded = torch.floor(exact * 2**10 + 0.5) / 2**10
    expected = rounded.sort(dim=1, descending=True, stable=True)
    assert (exact.sort(dim=1, descending=True).indices[:, :5] != expected.indices[:, :5]).any(), "rounding matters"
    for row in range(2):
        assert sorted(top_indices[row].tolist()) == sorted(expected.indices[row, :5].tolist())
        assert torch.equal(top_acts[row].double().cpu(), rounded[row, top_indices[row].long().cpu()])


def test_rows_with_fewer_than_k_positives_are_padded_with_zeros(device):
    x, W_enc, _ = encoder(device, 3, 64, 16)
    b_enc = torch.full((64,), -1000.0, device=device)
    b_enc[:32] = float("-inf")
    b_enc[7] = 1000.0
    top_acts, top_indices, failed = select_topk_certified(x, W_enc, b_enc, 4, SMALL)
    assert ((top_acts > 900).sum(1) == 1).all()
    assert top_indices[top_acts > 900].tolist() == [7, 7, 7]
    assert ((top_acts > 900) | (top_acts == 0)).all()
    assert ((top_indices >= 0) & (top_indices < 64)).all()
    assert not failed.any()


@pytest.mark.parametrize(("d_sae", "k"), [(24_576, 32), (131_072, 64), (16_384, 1), (3_072, 32), (100, 100)])
def test_tiling_leaves_room_for_k_and_for_what_is_recomputed(d_sae, k):
    tiling = select_tiling(d_sae, k)
    if tiling is not None:
        n_tiles = -(-d_sae // tiling.latents)
        assert n_tiles * tiling.n_candidates >= padded_k(k) >= k
        assert tiling.redo_latents >= padded_k(k)


@pytest.mark.parametrize(
    ("d_sae", "k", "expected"),
    [(24_576, 32, 5), (12_288, 32, 6), (16_384, 32, 5), (49_152, 32, 4), (65_536, 32, 4), (131_072, 64, 4)],
)
def test_a_tile_lists_the_fewest_candidates_that_rarely_miss_one(d_sae, k, expected):
    """One fewer misses too often. P(Poisson(rate) >= n) is the regularised lower incomplete gamma function."""
    tiling = select_tiling(d_sae, k)
    assert tiling is not None
    assert tiling.n_candidates == expected
    n_tiles = d_sae / tiling.latents
    n = torch.tensor([expected, expected - 1], dtype=torch.float64)
    fewest, fewer = (n_tiles * torch.special.gammainc(n, torch.tensor(k / n_tiles).double())).tolist()
    assert fewest < MAX_RECOMPUTED <= fewer


def test_a_k_beyond_the_tiles_is_selected_densely(device):
    x, W_enc, b_enc = encoder(device, 3, 100, 16)
    assert select_tiling(100, 90) is None
    top_acts, top_indices = select_topk(x, W_enc, b_enc, 90)
    assert_same_selection(x, W_enc, b_enc, 90, top_acts, top_indices)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "nothing fires"])
def test_select_threshold_equals_the_reference(device, kind):
    x, W_enc, b_enc = encoder(device, 5, 70, 80)
    generator = torch.Generator().manual_seed(1)
    threshold = {"relu": 0.0, "nothing fires": 1e9}.get(kind)
    if threshold is None:
        threshold = (torch.rand(70, generator=generator) * 20).to(device)
    found = select_threshold(x, W_enc, b_enc, threshold, tiling=SMALL_THRESHOLD)
    values, indices, offsets = reference.select_threshold(x, W_enc, b_enc, threshold)
    torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.indices.long(), indices)
    assert torch.equal(found.offsets, offsets)


def test_select_threshold_never_writes_past_its_capacity(device):
    x, W_enc, b_enc = encoder(device, 3, 70, 16)
    values, indices, offsets = reference.select_threshold(x, W_enc, b_enc, 0.0)
    found = select_threshold(x, W_enc, b_enc, 0.0, capacity=50, tiling=SMALL_THRESHOLD)
    assert len(values) > 50
    assert torch.equal(found.offsets, offsets)
    torch.testing.assert_close(found.values, values[:50], rtol=1e-5, atol=1e-4)
    assert torch.equal(found.indices.long(), indices[:50])


@pytest.mark.parametrize(("floor", "capacity", "certified"), [(0.0, None, True), (2.0, 400, True), (2.0, 20, False)])
def test_select_batch_topk_keeps_the_largest_of_the_batch(device, floor, capacity, certified):
    x, W_enc, b_enc = encoder(device, 4, 70, 16)
    found, least, certificate = select_batch_topk(x, W_enc, b_enc, 6, floor, capacity, SMALL_THRESHOLD)
    assert bool(certificate) is certified
    if certified:
        pre_acts = reference.pre_activations(x, W_enc, b_enc)
        kth = pre_acts.flatten().topk(24).values[-1]
        torch.testing.assert_close(least, kth)
        rows, latents = (pre_acts >= kth).nonzero(as_tuple=True)
        torch.testing.assert_close(found.values, pre_acts[rows, latents], rtol=1e-5, atol=1e-4)
        assert torch.equal(found.indices.long(), latents)
        assert torch.equal(found.offsets.diff(), torch.bincount(rows, minlength=4))


def test_select_batch_topk_certifies_no_shortage_under_a_floor(device):
    x, W_enc, b_enc = encoder(device, 2, 40, 16)
    found, least, certified = select_batch_topk(x, W_enc, b_enc, 30, 5.0, None, SMALL_THRESHOLD)
    assert not certified
    assert found.offsets[-1] < 60
    assert least == 0.0
    found, _, certified = select_batch_topk(x, W_enc, b_enc, 30, 0.0, None, SMALL_THRESHOLD)
    assert certified
    assert found.offsets[-1] == (reference.pre_activations(x, W_enc, b_enc) > 0).sum()


@pytest.mark.parametrize(
    ("batch", "d_sae", "d_in", "k"),
    [
        pytest.param(1, 70, 80, 1, id="one row, k=1, d_in=80"),
        pytest.param(200, 33, 16, 3, id="more rows than the sample"),
        pytest.param(2, 40, 16, 40, id="fewer positives than k"),
    ],
)
def test_batch_topk_above_its_own_floor_is_that_of_a_sort(device, batch, d_sae, d_in, k):
    x, W_enc, b_enc = encoder(device, batch, d_sae, d_in)
    pre_acts = reference.pre_activations(x, W_enc, b_enc)
    positive = pre_acts.flatten().sort(descending=True).values[: batch * k].relu()
    floor = batch_floor(x, W_enc, b_enc, k)
    assert (floor < positive[-1]) or floor == 0
    if batch == 200:
        assert (pre_acts > floor).sum() < 2 * batch * k, "few candidates are left"
    found, _, certified = select_batch_topk(x, W_enc, b_enc, k, floor, 2 * batch * k + 1024, SMALL_THRESHOLD)
    assert certified
    n = int(found.offsets[-1])
    assert n == (positive > 0).sum()
    torch.testing.assert_close(found.values[:n].sort(descending=True).values, positive[:n], rtol=1e-5, atol=1e-4)
    rows = reference.rows_of(found.offsets, n)
    torch.testing.assert_close(found.values[:n], pre_acts[rows, found.indices[:n].long()], rtol=1e-5, atol=1e-4)
    assert (found.indices[n:] == 0).all()
    again = select_batch_topk(x, W_enc, b_enc, k, floor, 2 * batch * k + 1024, SMALL_THRESHOLD)[0]
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_batch_topk_gives_ties_to_the_earlier_row_and_the_lower_latent(device):
    x = torch.ones(3, 16, device=device)
    W_enc = torch.zeros(64, 16, device=device)
    W_enc[[3, 9, 40]] = 1.0
    found, least, certified = select_batch_topk(x, W_enc, torch.zeros(64, device=device), 2, 0.0, 100, SMALL_THRESHOLD)
    assert certified
    assert least == 16.0
    assert found.offsets.tolist() == [0, 3, 6, 6]
    assert found.indices.tolist() == [3, 9, 40, 3, 9, 40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_latent_hot_in_every_row_and_one_in_none_are_found_so(device, dtype):
    x, W_enc, b_enc = encoder(device, 9, 40, 80, dtype)
    b_enc[7], b_enc[39] = 1e4, -1e4
    found = select_threshold(x, W_enc, b_enc, 0.0, capacity=400, tiling=SMALL_THRESHOLD)
    n = int(found.offsets[-1])
    assert (found.indices[:n] == 7).sum() == 9
    assert not (found.indices[:n] == 39).any()
    assert (found.indices[n:] == 0).all(), "what no entry takes still names a latent"
    top_indices = select_topk(x, W_enc, b_enc, 3, SMALL._replace(n_candidates=4))[1]
    assert (top_indices == 7).any(1).all()
