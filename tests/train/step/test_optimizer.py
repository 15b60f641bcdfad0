"""The optimizer equals PyTorch's Adam with the decoder's projection and normalisation written out."""

import msgspec
import pytest
import torch

import thresher.train.step.optimizer as optimizer_module
from thresher.train.architectures import make_architecture, make_config
from thresher.train.step.sae_trainer import Schedule
from thresher.train.step.schedule import lr_factor, sparsity_factor


@pytest.mark.parametrize("block", [1, 50, 1 << 18])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    "kind",
    [
        {"k": 2},
        {"architecture": "standard", "l1_coefficient": 1.0},
        {"architecture": "standard", "l1_coefficient": 1.0, "weight_decay": 0.3},
        {"k": 2, "weight_decay": 0.3},
        {"k": 2, "beta2": 0.7},
        {"k": 2, "decoder_lr_scale": 2.5},
        {"architecture": "gated", "l1_coefficient": 1.0, "beta1": 0.8},
        {"architecture": "gated", "l1_coefficient": 1.0, "threshold_lr_scale": 0.3, "decoder_lr_scale": 3.0},
        {"architecture": "jumprelu", "l0_coefficient": 1.0},
        {"architecture": "jumprelu", "l0_coefficient": 1.0, "threshold_lr_scale": 0.3},
        {"architecture": "jumprelu", "l0_coefficient": 1.0, "target_l0": 2.0, "decoder_lr_scale": 2.5},
    ],
)
def test_equals_adam(kind, clip, block, monkeypatch):
    monkeypatch.setattr(optimizer_module, "_BLOCK_ELEMENTS", block)
    architecture = make_architecture(make_config(hook_point="h", d_sae=13, **kind), 5)
    parameters = architecture.initial_parameters(torch.Generator().manual_seed(0))
    expected = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in parameters.items()}
    decay = kind.get("weight_decay", 0.0)
    groups = [{"params": [p], "weight_decay": decay if p.dim() > 1 else 0.0} for p in expected.values()]
    of_thresholds = kind.get("threshold_lr_scale", 4.0 if "target_l0" in kind else 1.0)
    betas = kind.get("beta1", architecture.betas[0]), kind.get("beta2", architecture.betas[1])
    of_kind = dict.fromkeys(("log_threshold", "b_gate", "b_mag", "r_mag"), of_thresholds)
    of_kind["W_dec"] = kind.get("decoder_lr_scale", 1.0)
    scales = [of_kind.get(name, 1.0) for name in expected]
    adam = torch.optim.AdamW(groups, lr=1, betas=betas, eps=architecture.eps)
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
        for group, scale in zip(adam.param_groups, scales, strict=True):
            group["lr"] = lr * scale
        adam.step()
        if architecture.unit_norm_decoder:
            W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
        ours.step(gradients, lr)
        for name, tensor in parameters.items():
            torch.testing.assert_close(tensor, expected[name].data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_a_cpus_blocks_go_to_other_threads(device, monkeypatch):
    """On a GPU another thread would launch on a device and a stream of its own, and break a capture."""
    monkeypatch.setattr(optimizer_module, "_BLOCK_ELEMENTS", 10)
    architecture = make_architecture(make_config(hook_point="h", d_sae=64, k=2), 5)
    initial = architecture.initial_parameters(torch.Generator().manual_seed(0))
    parameters = {name: tensor.to(device) for name, tensor in initial.items()}
    ours = optimizer_module.Optimizer(parameters, architecture)
    on_cores, asked, blocks = optimizer_module.on_cores, [], []

    def asking(work, items):
        asked.append(len(items))
        return on_cores(work, items)

    monkeypatch.setattr(optimizer_module, "on_cores", asking)
    monkeypatch.setattr(ours, "_step_block", lambda name, rows, *arguments: blocks.append((name, rows.start)))
    ours.step({name: tensor.clone() for name, tensor in parameters.items()}, 0.1)
    assert len(set(blocks)) == len(blocks) > 64
    assert asked == ([len(blocks)] if device == "cpu" else [])


def test_schedules():
    factors = [lr_factor(step, 100, 10, 0.2) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:81] == [1.0] * 72
    assert factors[90] == 0.5
    assert factors[99] == 1 / 20
    assert lr_factor(0, 10, 1000, 0.2) == 1 / 8
    assert [lr_factor(step, 3, 0, 0.0) for step in range(3)] == [1.0] * 3
    assert [lr_factor(step, 100, 10, 1.0) for step in (0, 4, 9, 50, 99)] == pytest.approx([0.1, 0.48, 0.91, 0.5, 0.01])
    assert [sparsity_factor(step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert sparsity_factor(0, 0) == 1.0


def test_cosine_decay_is_pytorchs():
    """After a warm-up and a constant part, half a cosine to zero; over the whole run, the usual schedule."""
    for decay_fraction, first in ((0.25, 75), (1.0, 0)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100 - first)
        for step in range(first, 100):
            found = lr_factor(step, 100, 10 if first else 0, decay_fraction, "cosine")
            assert found == pytest.approx(optimizer.param_groups[0]["lr"]), step
            optimizer.step()
            cosine.step()
    assert [lr_factor(step, 100, 10, 0.25, "cosine") for step in (0, 9, 40, 74)] == [0.1, 1.0, 1.0, 1.0]


def test_an_sae_may_have_its_own_schedule():
    schedule = Schedule(100, 8, 10, 0.2, "cosine")
    base = make_config(hook_point="h", d_sae=4, k=1)
    constant = msgspec.structs.replace(base, decay_fraction=0.0)
    linear = msgspec.structs.replace(base, lr_decay="linear", decay_fraction=0.5)
    for step in range(100):
        assert schedule.lr_factor(step, base) == lr_factor(step, 100, 10, 0.2, "cosine")
        assert schedule.lr_factor(step, constant) == min(1.0, (step + 1) / 10)
        assert schedule.lr_factor(step, linear) == lr_factor(step, 100, 10, 0.5)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_frozen_parameters_stay_and_the_others_move_as_without_them(clip):
    """The norm that is clipped is that of the others, and decay leaves frozen matrices as they are."""
    keys = {"hook_point": "h", "d_sae": 13, "k": 2, "weight_decay": 0.3}
    frozen = make_architecture(make_config(**keys, freeze=("W_dec", "b_enc")), 5)
    parameters = frozen.initial_parameters(torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in parameters.items()}
    moving = {name: torch.nn.Parameter(before[name].clone()) for name in ("W_enc", "b_dec")}
    groups = [{"params": [p], "weight_decay": 0.3 * (p.dim() > 1)} for p in moving.values()]
    adam = torch.optim.AdamW(groups, lr=0.1, betas=frozen.betas, eps=frozen.eps)
    ours = optimizer_module.Optimizer(parameters, frozen, clip)
    torch.manual_seed(1)
    for _ in range(3):
        gradients = {name: torch.randn_like(tensor) for name, tensor in parameters.items()}
        for name, parameter in moving.items():
            parameter.grad = gradients[name].clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(moving.values(), clip)
        adam.step()
        ours.step(gradients, 0.1)
    for name, tensor in parameters.items():
        if name in moving:
            torch.testing.assert_close(tensor, moving[name].data)
        else:
            assert torch.equal(tensor, before[name])
