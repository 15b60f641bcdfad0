"""The optimizer equals PyTorch's Adam with the decoder's projection and normalisation written out."""

import pytest
import torch

import thresher.train.optimizer as optimizer_module
from thresher.train.architectures import make_architecture
from thresher.train.config import SaeConfig
from thresher.train.schedule import lr_factor, sparsity_factor


@pytest.mark.parametrize("block", [1, 50, 1 << 18])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", [{"k": 2}, {"architecture": "standard", "l1_coefficient": 1.0}])
def test_equals_adam(kind, clip, block, monkeypatch):
    monkeypatch.setattr(optimizer_module, "_BLOCK_ELEMENTS", block)
    architecture = make_architecture(SaeConfig(hook_point="h", d_sae=13, **kind), 5)
    parameters = architecture.initial_parameters(torch.Generator().manual_seed(0))
    expected = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in parameters.items()}
    adam = torch.optim.Adam(expected.values(), lr=1, betas=architecture.betas, eps=architecture.eps)
    ours = optimizer_module.Optimizer(parameters, architecture, clip)
    torch.manual_seed(1)
    for lr in (0.1, 0.03, 0.01):
        gradients = {name: torch.randn_like(tensor) for name, tensor in parameters.items()}
        for name, parameter in expected.items():
            parameter.grad = gradients[name].clone()
        W_dec = expected["W_dec"]
        if architecture.unit_norm_decoder:
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec.data
        if clip:
            torch.nn.utils.clip_grad_norm_(expected.values(), clip)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        if architecture.unit_norm_decoder:
            W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
        ours.step(gradients, lr)
        for name, tensor in parameters.items():
            torch.testing.assert_close(tensor, expected[name].data, rtol=1e-5, atol=1e-6)


def test_schedules():
    factors = [lr_factor(step, 100, 10, 0.2) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:81] == [1.0] * 72
    assert factors[90] == 0.5
    assert factors[99] == 1 / 20
    assert lr_factor(0, 10, 1000, 0.2) == 1 / 8
    assert [lr_factor(step, 3, 0, 0.0) for step in range(3)] == [1.0] * 3
    assert [sparsity_factor(step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert sparsity_factor(0, 0) == 1.0
