"""The small kernels at both ends of a step against the reference, and against Python's own floats."""

from __future__ import annotations

import math

import pytest
import torch

from thresher.train.kernels import reference
from thresher.train.kernels import triton as fused
from thresher.train.kernels.fused_state import DivergenceWatch


@pytest.mark.parametrize("done", [0, 1, 2, 999, 1_000_000])
def test_a_step_begins_with_adams_corrections(device, done):
    betas = torch.tensor([0.9, 0.999], dtype=torch.float64, device=device)

    def after(begin):
        steps, schedule = torch.full((4,), float(done), device=device), torch.full((4,), 5.0, device=device)
        offsets = begin(steps, betas, schedule, 1300, 3)
        return steps, schedule, offsets

    (steps, schedule, offsets), expected = after(fused.begin_step), after(reference.begin_step)
    assert steps.tolist() == [done + 1] * 4
    for found, beta in zip(schedule[1:3], (0.9, 0.999), strict=True):
        assert float(found) == pytest.approx(-math.expm1((done + 1) * math.log(beta)), rel=1e-7)
    assert (schedule[0], schedule[3]) == (5.0, 5.0)
    assert offsets.tolist() == list(range(0, 3901, 3))
    for one, other in zip((steps, schedule, offsets), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("n_squares", "d_in"), [(1, 1), (1030, 80), (5, 1100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [1e-2, 1e6])
def test_the_norm_is_of_all_gradients(device, n_squares, d_in, dtype, max_norm):
    generator = torch.Generator().manual_seed(0)
    squares = torch.rand(n_squares, generator=generator).to(device, dtype)
    by_g, by_bias = (torch.randn(d_in, generator=generator).to(device) for _ in range(2))
    schedule, wanted = torch.full((4,), 5.0, device=device), torch.full((4,), 5.0, device=device)
    norm = fused.clip_gradients(squares, by_g, by_bias, schedule, max_norm)
    torch.testing.assert_close(norm, reference.clip_gradients(squares, by_g, by_bias, wanted, max_norm))
    torch.testing.assert_close(schedule, wanted)
    pairs = zip(by_g.tolist(), by_bias.tolist(), strict=True)
    exact = math.sqrt(sum(squares.tolist()) + math.fsum((a - b) ** 2 for a, b in pairs))
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    assert float(schedule[3]) == pytest.approx(min(1.0, max_norm / exact), rel=1e-4)


def test_a_norm_that_is_not_a_number_is_not_clipped_to_one(device):
    schedule, number = torch.ones(4, device=device), torch.full((1,), float("nan"), device=device)
    assert fused.clip_gradients(number, number, number, schedule, 1.0).isnan()
    assert schedule[3].isnan()


@pytest.mark.parametrize(("d_in", "n_groups"), [(1, 1), (300, 700)])
def test_b_dec_takes_adams_step(device, d_in, n_groups):
    generator = torch.Generator().manual_seed(0)
    weight, by_g, by_bias = torch.randn(3, d_in, generator=generator).to(device).unbind()
    schedule = torch.tensor([0.01, 0.1, 0.001, 0.5], device=device)
    n_dead_of_groups = torch.randint(17, (n_groups,), generator=generator, dtype=torch.int32).to(device)
    results = []
    for update in (fused.update_b_dec, reference.update_b_dec):
        b_dec, n_dead = fused.AdamState.of(weight), torch.full((), 5, dtype=torch.int32, device=device)
        update(b_dec, by_g, by_bias, fused.Hyperparameters(schedule), n_dead_of_groups, n_dead)
        assert n_dead == n_dead_of_groups.sum()
        results.append((b_dec.weight, b_dec.mean, b_dec.square))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not torch.equal(results[0][0], weight)


@pytest.mark.parametrize("n_rows", [1, 1500])
@pytest.mark.parametrize(("auxk", "n_dead"), [(False, 7), (True, 7), (True, 0)])
def test_metrics_are_means_of_rows(device, n_rows, auxk, n_dead):
    generator = torch.Generator().manual_seed(0)
    squared_error = torch.rand(n_rows, generator=generator).to(device)
    n_active = torch.randint(33, (n_rows,), generator=generator, dtype=torch.int32).to(device)
    dead = torch.full((), n_dead, dtype=torch.int32, device=device)
    auxiliary = (torch.full((), 0.25, device=device), 0.5) if auxk else ()
    found = fused.finish_step(squared_error, n_active, dead, 4.0, *auxiliary)
    expected = reference.finish_step(squared_error, n_active, dead, 4.0, *auxiliary)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
    total = math.fsum(squared_error.tolist())
    auxk_loss = 0.5 * 0.25 / total if auxk and n_dead else 0.0
    assert float(found.auxk_loss) == pytest.approx(auxk_loss)
    assert float(found.loss) == pytest.approx(total / n_rows / 4 + auxk_loss)
    assert float(found.explained_variance) == pytest.approx(1 - total / n_rows / 4)
    assert (float(found.l0), float(found.n_dead)) == (sum(n_active.tolist()) / n_rows, n_dead)


@pytest.mark.parametrize("finish", [fused.finish_step, reference.finish_step])
def test_an_exact_reconstruction_has_no_auxiliary_loss(device, finish):
    none, one = torch.zeros(2, device=device), torch.ones((), dtype=torch.int32, device=device)
    assert finish(none, one.expand(2).contiguous(), one, 4.0, torch.ones((), device=device), 0.5).loss == 0


@pytest.mark.parametrize("finish", [fused.finish_step, reference.finish_step])
@pytest.mark.parametrize(
    ("bad", "auxiliary"), [(float("nan"), 0.0), (float("inf"), 0.0), (9.0, 0.0), (1.0, float("nan"))]
)
def test_the_first_step_that_diverges_is_noted(device, finish, bad, auxiliary):
    now, failure = (torch.zeros(n, dtype=torch.float64, device=device) for n in (4, 3))
    watch, one = DivergenceWatch(now, failure, 8.0), torch.ones((), dtype=torch.int32, device=device)
    for step, error in enumerate((0.5, bad, 10.0, 1.0), start=1):
        now[0] = step
        auxk = torch.tensor(auxiliary if step == 2 else 0.0, device=device)
        finish(torch.full((2,), error, device=device), one.expand(2).contiguous(), one, 4.0, auxk, 0.5, watch)
        assert bool(failure[0] == 0) is (step == 1)
    assert failure[0] == 2
    assert failure[2].isnan() if math.isnan(bad) else failure[2] == bad


@pytest.mark.parametrize("d_in", [1, 80])
@pytest.mark.parametrize(("exact", "dtype"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.float32)])
def test_auxks_residual_is_the_losss_gradient(device, d_in, exact, dtype):
    generator = torch.Generator().manual_seed(0)
    e_hat, g = torch.randn(2, 3, d_in, generator=generator).to(device).unbind()
    e_hat, scale = e_hat.to(dtype), 0.3
    total = torch.zeros((), device=device) if exact else (g / scale).square().sum()
    found = fused.auxk_residual(e_hat, g, scale, total, 0.5, dtype)
    variable = e_hat.double().requires_grad_()
    squared_error = (variable + g.double() / scale).square().sum(1)
    loss = 0.5 * squared_error.sum() / total if not exact else 0 * squared_error.sum()
    (gradient,) = torch.autograd.grad(loss, variable)
    # The interpreter truncates where the GPU rounds.
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[0].double(), squared_error.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), gradient, rtol=rtol, atol=1e-7)
    for one, other in zip(found, reference.auxk_residual(e_hat, g, scale, total, 0.5, dtype), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=1e-6)
