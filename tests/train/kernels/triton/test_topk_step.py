"""A step of fused kernels against autograd, torch.optim.Adam and torch's own clipping."""

from __future__ import annotations

import pytest
import torch

import thresher.train.kernels.triton.topk_step as step_module
from thresher.train.kernels.triton.topk_step import TopKOptions, TopKStep

D_SAE, D_IN, BATCH, VARIANCE = 13, 80, 5, 40.0
# With Adam's own, the last bit of a gradient near zero decides which way a weight goes.
EPS = 1e-5


def initial(device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    W_enc = W_dec + 0.02 * torch.randn(D_SAE, D_IN, generator=generator)
    parameters = {
        "W_enc": W_enc,
        "b_enc": 0.1 * torch.randn(D_SAE, generator=generator),
        "W_dec": W_dec,
        "b_dec": 0.1 * torch.randn(D_IN, generator=generator),
    }
    # One latent fires in every row, one in none.
    parameters["b_enc"][3], parameters["b_enc"][-1] = 20.0, -20.0
    x = torch.randn(BATCH, D_IN, generator=generator).to(torch.bfloat16)
    return {name: tensor.to(device) for name, tensor in parameters.items()}, x.to(device)


class Autograd:
    """The same steps in plain PyTorch; what the products read of a weight is its bfloat16 shadow."""

    def __init__(self, parameters, options):
        self.options = options
        self.parameters = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
        groups = [
            {"params": [parameter], "lr": 1e-2 * (options.decoder_lr_scale if name == "W_dec" else 1.0)}
            for name, parameter in self.parameters.items()
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(options.beta1, options.beta2), eps=options.eps)
        self.since = torch.zeros(D_SAE, device=parameters["W_enc"].device)

    def step(self, x, shadows):
        options, x = self.options, x.float()
        W_enc, W_dec = (
            weight + (shadow.float() - weight).detach()
            for weight, shadow in zip((self.parameters["W_enc"], self.parameters["W_dec"]), shadows, strict=True)
        )
        # The step's bias is of the float32 weights: W_enc (x - b_dec) with the shadow in the first product alone.
        pre_acts = x @ W_enc.T + self.parameters["b_enc"] - self.parameters["W_enc"] @ self.parameters["b_dec"]
        top = pre_acts.topk(options.k)
        latents = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
        residual = latents @ W_dec + self.parameters["b_dec"] - x
        loss = residual.square().sum(1).mean() / options.total_variance
        dead = self.since >= options.dead_after_tokens
        auxiliary = torch.zeros((), device=x.device)
        if options.aux_coefficient and dead.any():
            held = residual.detach()
            aux = pre_acts.masked_fill(~dead, float("-inf")).topk(options.k_aux)
            aux_latents = torch.zeros_like(pre_acts).scatter(1, aux.indices, aux.values.relu())
            auxiliary = (aux_latents @ W_dec + held).square().sum() / held.square().sum() * options.aux_coefficient
        self.since = (self.since + len(x)) * ~(latents > 0).any(0)
        self.optimizer.zero_grad()
        (loss + auxiliary).backward()
        weight = self.parameters["W_dec"].detach()
        gradient = self.parameters["W_dec"].grad
        gradient -= (gradient * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True) * weight
        if options.max_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), options.max_norm)
        self.optimizer.step()
        weight.div_(weight.norm(dim=1, keepdim=True))
        l0 = (latents > 0).sum() / len(x)
        return torch.stack([loss * options.total_variance, l0, auxiliary]).detach().double()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(TopKOptions(3, VARIANCE, eps=EPS, decoder_lr_scale=2.5), id="plain"),
        pytest.param(
            TopKOptions(1, VARIANCE, eps=EPS, max_norm=0.05, aux_coefficient=0.5, k_aux=2, dead_after_tokens=BATCH),
            id="clipped, AuxK, k=1",
        ),
    ],
)
def test_steps_equal_autograds(device, options):
    parameters, x = initial(device)
    fused, plain = TopKStep(parameters, options), Autograd(parameters, options)
    fused.set_lr(1e-2)
    # The interpreter truncates AuxK's gradient to bfloat16, where a GPU rounds it.
    atol = 1e-4 if options.aux_coefficient else 2e-5
    for _ in range(2):
        shadows = [fused.W_enc.shadow.clone(), fused.W_dec.shadow.clone()]
        n_dead = (plain.since >= options.dead_after_tokens).sum()
        expected = plain.step(x, shadows)
        found = fused(x)
        numbers = torch.stack([found.mse, found.l0, found.auxk_loss])
        torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-5)
        assert found.n_dead == n_dead
        for name, tensor in fused.parameters().items():
            torch.testing.assert_close(tensor, plain.parameters[name].detach(), rtol=1e-4, atol=atol, msg=name)
    for state in (fused.W_enc, fused.W_dec):
        # The interpreter truncates where the GPU rounds.
        torch.testing.assert_close(state.shadow.float(), state.weight, rtol=2**-7, atol=1e-8)
    assert torch.equal(fused.tokens_since_fired.float(), plain.since)


def by_sparse_entries(step, x, bias, dead, error, squared_error):
    """AuxK's loss and gradients from each row's largest dead latents, entry by entry in float64."""
    options, W_enc, W_dec = step.options, step.W_enc.shadow.double(), step.W_dec.shadow.double()
    pre_acts = x.double() @ W_enc.T + bias.double()
    values, latents = pre_acts.masked_fill(~dead, -torch.inf).topk(options.k_aux)
    difference = error.double().clone()
    for row in range(len(x)):
        for value, latent in zip(values[row].relu(), latents[row], strict=True):
            difference[row] += value * W_dec[latent]
    g = difference * 2 * options.aux_coefficient / squared_error
    by = {"W_enc": torch.zeros_like(W_enc), "W_dec": torch.zeros_like(W_dec), "b_enc": torch.zeros_like(bias).double()}
    for row in range(len(x)):
        for value, latent in zip(values[row], latents[row], strict=True):
            if value > 0:
                by["W_dec"][latent] += value * g[row]
                by["W_enc"][latent] += (g[row] @ W_dec[latent]) * x[row].double()
                by["b_enc"][latent] += g[row] @ W_dec[latent]
    return options.aux_coefficient * difference.square().sum() / squared_error, by


@pytest.mark.parametrize("room", [4, 8, D_SAE])
@pytest.mark.parametrize("rows_at_a_time", [1, BATCH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_auxk_is_that_of_the_sparse_entries(device, monkeypatch, room, rows_at_a_time, dtype):
    """For four dead latents, in room for so many or more, rows at once or not, and the same bits twice."""
    monkeypatch.setattr(step_module, "_AUXK_ENTRIES", rows_at_a_time * room)
    parameters, x = initial(device)
    x = x.to(dtype)
    options = TopKOptions(3, VARIANCE, aux_coefficient=0.5, k_aux=3, dead_after_tokens=1)
    step = TopKStep(parameters, options, dtype)
    dead = torch.zeros(D_SAE, dtype=torch.bool, device=device)
    dead[[1, 4, 6, 9]] = True
    bias = torch.linspace(-3, 3, D_SAE, device=device)
    error = torch.linspace(-1, 1, BATCH * D_IN, device=device).view(BATCH, D_IN).flip(1)
    squared_error, scale = error.square().sum(), 0.25
    found_error, found = step._auxk(x, error * scale, scale, squared_error, bias, dead, room)
    loss = options.aux_coefficient * found_error / squared_error
    expected_loss, expected = by_sparse_entries(step, x, bias, dead, error, squared_error)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 5e-3}
    torch.testing.assert_close(loss.double(), expected_loss, **tolerance)
    assert set(found.slots[dead].tolist()) == {0, 1, 2, 3}
    for name, gradient in expected.items():
        rows = torch.zeros_like(gradient)
        there = found.slots >= 0
        rows[there] = getattr(found, name)[found.slots[there].long()].double()
        torch.testing.assert_close(rows, gradient, msg=name, **tolerance)
        assert gradient[dead].abs().max() > 0.01, "there is something to compare"
    again = step._auxk(x, error * scale, scale, squared_error, bias, dead, room)
    assert torch.equal(again[0], found_error)
    assert all(torch.equal(one, other) for one, other in zip(again[1], found, strict=True))


@pytest.mark.gpu
def test_a_captured_step_replays_and_repeats_in_every_bit():
    options = TopKOptions(3, VARIANCE, max_norm=1.0, aux_coefficient=1 / 32, k_aux=4, dead_after_tokens=BATCH)
    parameters, x = initial("cuda")
    eager, again, captured = (TopKStep(parameters, options) for _ in range(3))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Kernels compile before the capture.
        TopKStep(parameters, options)(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = torch.stack(captured(x))
    for number in range(5):
        for step in (eager, again, captured):
            step.set_lr(1e-3 * (number + 1))
        expected = torch.stack(eager(x))
        again(x)
        graph.replay()
        assert torch.equal(metrics, expected)
    for name, tensor in eager.parameters().items():
        assert torch.equal(tensor, again.parameters()[name])
        assert torch.equal(tensor, captured.parameters()[name])
