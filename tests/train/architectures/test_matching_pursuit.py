"""Matching pursuit: its step against float64 NumPy and autograd, and what it saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from thresher.shared.core.errors import SaeError
from thresher.shared.sae import Sae
from thresher.train.architectures import make_architecture, make_config
from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.architectures.refined import matching_pursuit
from thresher.train.architectures.refined.matching_pursuit import pursue
from thresher.train.kernels import kernels_for
from thresher.train.stream.normalization import Normalization

D_IN, D_SAE, BATCH = 7, 19, 33


def problem(k=5, noise=0.3):
    """Return the architecture, float64 parameters whose directions are not of unit norm, and rows."""
    config = make_config(architecture="matching_pursuit", hook_point="h", d_sae=D_SAE, k=k)
    architecture = make_architecture(config, D_IN)
    torch.manual_seed(0)
    parameters = {
        name: tensor.double() + noise * torch.randn(tensor.shape, dtype=torch.float64)
        for name, tensor in architecture.initial_parameters(torch.Generator().manual_seed(0)).items()
    }
    return architecture, parameters, torch.randn(BATCH, D_IN, dtype=torch.float64)


def by_hand(x, p, k):
    """Return the latents of each row, by NumPy, one row and step at a time."""
    W, latents = p["W_dec"].numpy(), np.zeros((len(x), D_SAE))
    for row, values in zip(x.numpy() - p["b_dec"].numpy(), latents, strict=True):
        left = row.copy()
        for _ in range(k):
            products = W @ left
            best = products.argmax()
            if products[best] > 0:
                values[best] += products[best]
                left -= products[best] * W[best]
    return latents


@pytest.fixture(params=["gram", "products"])
def way(request, monkeypatch):
    """Both ways to the products with the residual, in blocks of rows of several sizes."""
    monkeypatch.setattr(matching_pursuit, "_ROW_BLOCK", 10)
    if request.param == "products":
        monkeypatch.setattr(matching_pursuit, "_WIDEST_GRAM", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_step_is_that_of_the_definition(k):
    """With k = 12, rows choose a latent again, and some have nothing left to choose."""
    architecture, p, x = problem(k)
    latents = by_hand(x, p, k)
    found = pursue(x - p["b_dec"], p["W_dec"], k)
    dense = torch.zeros(BATCH, D_SAE, dtype=torch.float64).scatter_add_(1, found.chosen, found.values)
    np.testing.assert_allclose(dense.numpy(), latents, rtol=1e-10, atol=1e-12)
    x_hat = latents @ p["W_dec"].numpy() + p["b_dec"].numpy()
    np.testing.assert_allclose(found.residual.numpy(), x.numpy() - x_hat, atol=1e-10)

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    left = x - leaves["b_dec"]
    for step in range(k):
        w = leaves["W_dec"][found.chosen[:, step]]
        left = left - (left * w).sum(1).relu()[:, None] * w
    loss = left.square().sum(1).mean() / 3.7
    step = StepInput(kernels=kernels_for("cpu"), W_enc_compute=p["W_dec"], total_variance=3.7)
    output = architecture.step({name: tensor.clone() for name, tensor in p.items()}, Batch(x, x), step)
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-10)
    assert float(output.mse) == pytest.approx(loss.item() * 3.7, rel=1e-10)
    assert float(output.l0) == pytest.approx((latents > 0).sum(1).mean())
    np.testing.assert_array_equal(output.fired.numpy(), (latents > 0).any(0))
    for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(output.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
    again = (np.stack([np.bincount(row, minlength=D_SAE) for row in found.chosen.numpy()]) > 1).any(1)
    assert (k == 12) == (again.mean() > 0.5)


def test_the_saved_sae_computes_what_was_trained(tmp_path):
    """In raw units: rows are normalised, pursued, and scaled back."""
    architecture, p, x = problem(noise=0.0)
    p = {name: tensor.float() for name, tensor in p.items()}
    p["b_dec"] += torch.linspace(-0.5, 0.5, D_IN)
    mean, scale = torch.arange(D_IN).float(), 0.25
    sae = architecture.to_sae(p, {}, Normalization(mean, scale, 1.0), {})
    loaded = Sae.load(sae.save(tmp_path / "sae"))
    assert (loaded.architecture, loaded.config["k"], loaded.config["max_iterations"]) == ("matching_pursuit", 5, 5)
    latents = torch.from_numpy(by_hand(x, {name: tensor.double() for name, tensor in p.items()}, 5)).float()
    raw = x.float() / scale + mean
    torch.testing.assert_close(loaded.encode(raw), latents / scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded(raw), (latents @ p["W_dec"] + p["b_dec"]) / scale + mean, rtol=1e-4, atol=1e-4)


def test_training_does_not_start_from_directions_of_other_norms():
    architecture, p, _ = problem()
    sae = Sae("matching_pursuit", {name: 2 * tensor.float() for name, tensor in p.items()}, hook_point="h", config={})
    with pytest.raises(SaeError, match="decoder norms are"):
        architecture.check_source(sae)


PEER = """
import sys, torch
from safetensors.torch import load_file, save_file
import sae_lens
given, out = load_file(sys.argv[1]), {}
ends = {"max_iterations": 5, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
config = sae_lens.MatchingPursuitTrainingSAEConfig(d_in=7, d_sae=19, dtype="float64", decoder_init_norm=1.0, **ends)
sae = sae_lens.MatchingPursuitTrainingSAE(config)
sae.W_dec.data, sae.b_dec.data = given["W_dec"], given["b_dec"]
loss = (sae(given["x"]) - given["x"]).square().sum(1).mean()
out["W_dec"], out["b_dec"] = torch.autograd.grad(loss, [sae.W_dec, sae.b_dec])
trained = sae_lens.SAE.load_from_disk(sys.argv[2])
out["latents"], out["x_hat"] = trained.encode(given["raw"]).detach(), trained(given["raw"]).detach()
save_file({name: value.contiguous() for name, value in out.items()}, sys.argv[3])
"""


@pytest.mark.peers
def test_saelens_trains_and_computes_the_same(tmp_path, run_peers):
    """Its training class has our gradients, and its class for inference our latents of what was saved."""
    architecture, p, x = problem(noise=0.0)
    p["b_dec"] += torch.linspace(-0.5, 0.5, D_IN).double()
    floats = {name: tensor.float() for name, tensor in p.items()}
    sae = architecture.to_sae(floats, {}, Normalization(torch.arange(D_IN).float(), 0.25, 1.0), {})
    raw = 4 * x.float() + torch.arange(D_IN)
    save_file({**p, "x": x, "raw": raw}, tmp_path / "given.safetensors")
    run_peers("-c", PEER, tmp_path / "given.safetensors", sae.save(tmp_path / "sae"), tmp_path / "out.safetensors")
    theirs = load_file(tmp_path / "out.safetensors")
    step = StepInput(kernels=kernels_for("cpu"), W_enc_compute=p["W_dec"], total_variance=1.0)
    ours = architecture.step(p, Batch(x, x), step)
    for name in ("W_dec", "b_dec"):
        torch.testing.assert_close(ours.gradients[name], theirs[name], rtol=1e-9, atol=1e-11, msg=name)
    torch.testing.assert_close(sae.encode(raw), theirs["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(raw), theirs["x_hat"], rtol=1e-5, atol=1e-5)
