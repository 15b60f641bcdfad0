"""The screen's k largest against float64, on data made to mislead an int8 product, and the bound of its error."""

from __future__ import annotations

import pytest
import torch

from thresher.shared.core.compute.cores import single_threaded_operators
from thresher.train.architectures import make_architecture, make_config
from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.architectures.parts.latents import largest_of_rows
from thresher.train.kernels import cpu
from thresher.train.kernels.cpu import screen as cpu_screen
from thresher.train.kernels.cpu.int8 import DEVIATIONS, LEVELS, Int8Encoder, multiplies_int8, peaks_of
from thresher.train.kernels.cpu.screen import screened_topk

pytestmark = pytest.mark.skipif(not multiplies_int8(), reason="needs a CPU that multiplies int8 (AVX-512 VNNI)")


@pytest.fixture(autouse=True)
def _however_small(monkeypatch):
    monkeypatch.setattr(cpu_screen, "LEAST_WEIGHTS", 0)


def gaussian(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def outliers(x):
    x[:, [3, 17, 40]] *= torch.tensor([60.0, 25.0, 9.0])
    return x


def of_few_directions(x):
    return gaussian(len(x), 6, 5) @ gaussian(6, x.shape[1], 6) + 0.1 * x


def nearly_constant(x):
    """All columns but one are a third of a step, which rounding to nearest loses."""
    return torch.cat([x[:, :1].sign() * 20, torch.full_like(x[:, 1:], 20 / LEVELS / 3)], 1) + 1e-4 * x


def sparse(x):
    return x.relu() * (x > 1.5) - 0.05


INPUTS = {
    "gaussian": lambda x: x,
    "outliers": outliers,
    "few directions": of_few_directions,
    "nearly constant": nearly_constant,
    "sparse": sparse,
    "rows of all sizes": lambda x: x * torch.logspace(-0.5, 0.5, len(x))[:, None],
}


def peaked(W):
    """Rows of which one column carries most, and the others the rest together."""
    W = W.sign() * 0.02
    W[torch.arange(len(W)), torch.arange(len(W)) % W.shape[1]] = 6.0
    return W


WEIGHTS = {
    "gaussian": lambda W: W,
    "norms of all sizes": lambda W: W * torch.logspace(-2, 1, len(W))[torch.randperm(len(W))][:, None],
    "peaked": peaked,
    "of one sign": lambda W: W.abs() * 0.2 + 0.01,
}


@pytest.mark.parametrize("of_weights", WEIGHTS)
@pytest.mark.parametrize("of_inputs", INPUTS)
def test_the_k_largest_are_those_of_float64(of_inputs, of_weights):
    x, W = INPUTS[of_inputs](gaussian(300, 100)), WEIGHTS[of_weights](gaussian(1600, 100, 1)) / 10
    b_enc, b_dec = gaussian(1, 1600, 2)[0] * 0.1, gaussian(1, 100, 3)[0] * 0.2
    exact = (x.double() - b_dec) @ W.double().T + b_enc
    found = screened_topk(x, W, b_enc, b_dec, 24)
    assert found is not None
    values, latents = found
    expected = torch.topk(exact, 24, dim=1).values
    scale = exact.abs().amax(1, keepdim=True)
    # What is chosen may differ from float64's only where float32's own rounding decides.
    assert ((values.double().sort(1, descending=True).values.relu() - expected.relu()).abs() <= 1e-5 * scale).all()
    positive = values > 0
    assert ((exact.gather(1, latents) - values).abs() <= 1e-5 * scale)[positive].all()
    for row, kept in zip(latents, positive, strict=True):
        assert len(row[kept].unique()) == int(kept.sum())


@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), [(1, 64, 1024, 8), (257, 33, 3072, 32), (70, 130, 640, 48)])
def test_shapes_that_fit_no_block(batch, d_in, d_sae, k):
    x, W, zeros = gaussian(batch, d_in), gaussian(d_sae, d_in, 1), torch.zeros(d_sae)
    found = screened_topk(x, W, zeros, torch.zeros(d_in), k)
    assert found is not None
    expected = torch.topk(x.double() @ W.double().T, k, dim=1).indices
    assert torch.equal(found[1].sort(1).values, expected.sort(1).values)


def test_rows_with_fewer_positive_ones_have_all_of_them():
    x, W = gaussian(64, 80), gaussian(1600, 80, 1)
    b_enc = torch.full((1600,), -24.0)
    exact = x.double() @ W.double().T + b_enc
    assert 0 == int((exact > 0).sum(1).min()) < int((exact > 0).sum(1).max()) < 32
    found = screened_topk(x, W, b_enc, torch.zeros(80), 32)
    assert found is not None
    values, latents = found
    dense = torch.zeros_like(exact).scatter_add_(1, latents, values.relu().double())
    torch.testing.assert_close(dense, exact.relu(), rtol=1e-5, atol=1e-4)


def test_crowded_rows_are_computed_whole_and_crowded_batches_are_refused():
    x, W, b_enc = gaussian(200, 80), gaussian(1600, 80, 1), gaussian(1, 1600, 2)[0].abs() * 1e-6
    x[:12] = 0  # every latent is as near to the k-th largest as any
    found = screened_topk(x, W, b_enc, torch.zeros(80), 16)
    assert found is not None
    expected = torch.topk(x.double() @ W.double().T + b_enc, 16, dim=1).indices
    assert torch.equal(found[1].sort(1).values, expected.sort(1).values)
    x[:60] = 0
    assert screened_topk(x, W, b_enc, torch.zeros(80), 16) is None


def test_a_batch_without_positive_ones_is_refused():
    x, W = gaussian(64, 80), gaussian(1600, 80, 1)
    assert screened_topk(x, W, torch.full((1600,), -1e3), torch.zeros(80), 32) is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_is_refused(bad, where):
    arguments = [gaussian(40, 64), gaussian(1024, 64, 1), torch.zeros(1024), torch.zeros(64)]
    assert screened_topk(*arguments, 8) is not None
    arguments[where].view(-1)[7] = bad
    assert screened_topk(*arguments, 8) is None


def test_it_is_for_large_float32_weights_of_latents_that_group_and_small_k(monkeypatch):
    def found(dtype, d_sae, k=8, rows=40):
        x, W = gaussian(rows, 64).to(dtype), gaussian(d_sae, 64, 1).to(dtype)
        return screened_topk(x, W, W.new_zeros(d_sae), W.new_zeros(64), k) is not None

    assert [found(torch.float32, 1024), found(torch.float64, 1024), found(torch.float32, 1023)] == [True, False, False]
    assert [found(torch.float32, 4096, 256), found(torch.float32, 4096, 257)] == [True, False]
    assert not found(torch.float32, 1024, rows=0)
    monkeypatch.setattr(cpu_screen, "LEAST_WEIGHTS", 1024 * 64 + 1)
    assert not found(torch.float32, 1024)
    monkeypatch.setattr(cpu_screen, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(cpu_screen, "multiplies_int8", lambda: False)
    assert not found(torch.float32, 1024)


def test_bits_do_not_depend_on_the_number_of_threads():
    x, W, zeros = gaussian(700, 64), gaussian(2048, 64, 1), torch.zeros(2048)
    x[:40] = 0
    several = screened_topk(x, W, zeros, torch.zeros(64), 16)
    with single_threaded_operators():
        one = screened_topk(x, W, zeros, torch.zeros(64), 16)
    assert several is not None
    assert one is not None
    assert all(map(torch.equal, several, one))


@pytest.mark.parametrize("of_weights", WEIGHTS)
@pytest.mark.parametrize("of_inputs", [name for name in INPUTS if name != "rows of all sizes"])
def test_the_products_error_is_within_its_bound_and_has_no_bias(of_inputs, of_weights):
    x, W = INPUTS[of_inputs](gaussian(256, 300)), WEIGHTS[of_weights](gaussian(1024, 300, 1))
    encoder = Int8Encoder.of(W, torch.ones(300))
    step = peaks_of(x).amax() / LEVELS
    scale, offset, bound = encoder.scales(step, x.norm(dim=1).amax())
    sums = encoder.inputs(x / step).double() @ encoder.q.double().T
    error = sums * scale + offset - x.double() @ W.double().T
    share = error.abs() > bound
    # Three standard deviations of a sum of uniform errors are exceeded by 0.0027; errors of a latent are alike.
    assert float(share.double().mean()) < 0.012
    assert float((error / bound * DEVIATIONS).square().mean().sqrt()) < 1.15


def test_the_architecture_chooses_by_it_and_only_below_full_precision(monkeypatch):
    x, W, b_enc, b_dec = gaussian(128, 64), gaussian(1600, 64, 1), gaussian(1, 1600, 2)[0], gaussian(1, 64, 3)[0]
    parameters = {"W_enc": W, "b_enc": b_enc, "W_dec": W, "b_dec": b_dec}
    exact = torch.topk((x.double() - b_dec) @ W.double().T + b_enc, 12, dim=1).indices.sort(1).values

    def chosen(dtype):
        step, batch = StepInput(cpu.Cpu(), W.to(dtype), 1.0), Batch(x, x.to(dtype))
        latents = largest_of_rows(step, parameters, batch, 12, centred=True)
        assert torch.equal(latents.csc.order.sort().values, torch.arange(128 * 12))
        return latents.indices.view(128, 12).sort(1).values

    assert torch.equal(chosen(torch.bfloat16), exact)
    called = []
    monkeypatch.setattr(cpu, "screened_topk", lambda *arguments: called.append(arguments))
    assert torch.equal(chosen(torch.float32), exact)
    assert not called
    assert not torch.equal(chosen(torch.bfloat16), exact)
    assert called


def test_hierarchical_topk_counts_no_latent_twice_where_few_are_positive():
    x, W, b_enc = gaussian(64, 80), gaussian(1600, 80, 1), torch.full((1600,), -18.0)
    parameters = {"W_enc": W, "b_enc": b_enc, "W_dec": W, "b_dec": torch.zeros(80)}
    config = make_config(hook_point="h", architecture="hierarchical_topk", d_sae=1600, k=32)
    architecture = make_architecture(config, 80, 80)
    exact = (x.double() @ W.double().T + b_enc).relu()
    assert 0 < int((exact > 0).sum(1).amin()) < 32
    output = architecture.step(parameters, Batch(x, x.bfloat16()), StepInput(cpu.Cpu(), W.bfloat16(), 1.0))
    kept = exact.sort(1, descending=True)
    assert output.l0 == int((kept.values[:, :32] > 0).sum()) / 64
    largest = torch.zeros_like(exact).scatter_(1, kept.indices[:, :32], kept.values[:, :32])
    assert output.mse == pytest.approx(float((x - largest @ W.double()).square().sum(1).mean()), rel=1e-5)
