"""LISTA-Matryoshka's gradients equal autograd's in float64, through both choices; the saved SAE is the trained one."""

from __future__ import annotations

import pytest
import torch

from thresher.train.architectures import make_architecture, make_config
from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.kernels import kernels_for
from thresher.train.stream.normalization import Normalization

D_IN, D_SAE, K = 7, 19, 3


def problem(**keys):
    config = make_config(architecture="lista_matryoshka", hook_point="h", d_sae=D_SAE, k=K, **keys)
    architecture = make_architecture(config, D_IN)
    torch.manual_seed(0)
    parameters = {
        name: tensor.double() + 0.3 * torch.randn(tensor.shape, dtype=torch.float64)
        for name, tensor in architecture.initial_parameters(torch.Generator().manual_seed(0)).items()
    }
    return architecture, parameters, torch.randn(13, D_IN, dtype=torch.float64)


def largest_of_batch(pre_acts):
    lowest = pre_acts.flatten().sort(descending=True).values[K * len(pre_acts) - 1]
    return pre_acts.relu() * (pre_acts >= lowest)


@pytest.mark.parametrize("prefixes", [(19,), (4, 9, 19)])
@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize("n_dead", [0, 5])
def test_gradients(prefixes, rate, n_dead):
    architecture, p, x = problem(prefix_sizes=prefixes, refine_rate=rate, aux_coefficient=0.4)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    W_enc, b_enc, W_dec, b_dec = (leaves[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    first = largest_of_batch((x - b_dec) @ W_enc.T + b_enc)
    u = x + rate * (x - b_dec - first @ W_dec)
    second = largest_of_batch((u - b_dec) @ W_enc.T + b_enc)
    assert ((first > 0) != (second > 0)).any()
    errors = [x - b_dec - second[:, :n] @ W_dec[:n] for n in prefixes]
    loss = sum(error.square().sum(1).mean() for error in errors) / 3.7
    dead = torch.arange(D_SAE) < n_dead
    if n_dead:
        residual = errors[-1].detach()
        values, indices = ((x - b_dec) @ W_enc[:n_dead].T + b_enc[:n_dead]).topk(3, dim=1)
        e_hat = torch.zeros(13, n_dead, dtype=torch.float64).scatter(1, indices, values.relu()) @ W_dec[:n_dead]
        loss = loss + 0.4 * (residual - e_hat).square().sum() / residual.square().sum()
    step = StepInput(
        kernels=kernels_for("cpu"),
        W_enc_compute=p["W_enc"],
        total_variance=3.7,
        dead=dead if n_dead else None,
        buffers=architecture.initial_buffers(),
    )
    output = architecture.step({name: tensor.clone() for name, tensor in p.items()}, Batch(x, x), step)
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-10)
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(output.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
    assert float(step.buffers["first_threshold"]) == pytest.approx(first[first > 0].min().item())
    assert float(step.buffers["threshold"]) == pytest.approx(second[second > 0].min().item())


def test_the_saved_sae_computes_what_was_trained():
    """In raw units: rows are normalised, chosen twice above both thresholds, and scaled back."""
    architecture, p, x = problem(refine_rate=0.5)
    p = {name: tensor.float() for name, tensor in p.items()}
    p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)
    mean, scale = torch.arange(D_IN).float(), 0.25
    buffers = {"threshold": torch.tensor(0.7), "first_threshold": torch.tensor(0.4)}
    sae = architecture.to_sae(p, buffers, Normalization(mean, scale, 1.0), {})
    assert (sae.architecture, sae.config["refine_rate"]) == ("lista", 0.5)
    x = x.float()
    pre_acts = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    first = pre_acts * (pre_acts > 0.4)
    u = x + 0.5 * (x - p["b_dec"] - first @ p["W_dec"])
    pre_acts = (u - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    x_hat = (pre_acts * (pre_acts > 0.7)) @ p["W_dec"] + p["b_dec"]
    torch.testing.assert_close(sae(x / scale + mean), x_hat / scale + mean, rtol=1e-4, atol=1e-4)
