"""A short training run is the same by the whole fused step, by separate kernels and by the references."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from thresher.train.architectures import make_config
from thresher.train.architectures.contract import Batch
from thresher.train.architectures.topk import TopK
from thresher.train.checkpoints.checkpoint import load_state, save_state
from thresher.train.kernels.reference import Reference
from thresher.train.kernels.triton import Triton
from thresher.train.step.fused_step import FusedStep
from thresher.train.step.op_by_op import OpByOp
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.step.step_numbers import read_metrics
from thresher.train.stream.normalization import Normalization

D_IN, BATCH, N_STEPS = 24, 4, 4
REFERENCE, FUSED = Reference(), Triton()
NORMALIZATION = Normalization(torch.linspace(-1, 1, D_IN), 1.5, float(D_IN))


@pytest.fixture(autouse=True)
def _large_eps(monkeypatch):
    """Far from Adam's own, with which the last bit of a gradient near zero decides which way a weight goes."""
    monkeypatch.setattr(TopK, "eps", 1e-4)


def make_trainer(kernels, device, fuse=True, dtype=torch.float32):
    # Latents are dead after one step without firing, so that AuxK has work.
    config = make_config(
        hook_point="x", d_sae=17, k=2, lr=1e-2, clip_grad_norm=1.0, k_aux=3, dead_after_tokens=BATCH, aux_coefficient=1
    )
    return SaeTrainer(
        config=config,
        d_in=D_IN,
        normalization=NORMALIZATION,
        schedule=Schedule(N_STEPS, BATCH, 1, 0.5),
        kernels=kernels,
        compute_dtype=dtype,
        device=device,
        fuse=fuse,
    )


def train(trainer, n_steps=N_STEPS):
    metrics = {}
    while trainer.steps_done < n_steps:
        generator = torch.Generator().manual_seed(trainer.steps_done)
        x = torch.randn(BATCH, D_IN, generator=generator).to(trainer.device)
        metrics = read_metrics(trainer.step(Batch(x, x.to(trainer.mode.compute_dtype))))
    trainer.check()
    assert trainer.diverged is None
    return metrics


def states(trainer):
    return {name: tensor.detach().cpu().clone() for name, tensor in trainer.state_dict().items()}


def test_every_path_trains_the_same_and_the_fused_step_resumes_in_every_bit(device, tmp_path):
    expected = make_trainer(REFERENCE, device)
    assert isinstance(expected.mode, OpByOp)
    expected_metrics = train(expected)
    assert expected_metrics["auxk_loss"] > 0
    ops = make_trainer(FUSED, device, fuse=False)
    assert isinstance(ops.mode, OpByOp)
    whole = make_trainer(FUSED, device)
    assert isinstance(whole.mode, FusedStep)
    train(whole, 2)
    save_state(tmp_path, "sae", 2, whole.state_dict())
    for trainer in (ops, whole):
        assert train(trainer) == pytest.approx(expected_metrics, rel=1e-4)
        found = states(trainer)
        for name, tensor in states(expected).items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    sae, expected_sae = (trainer.to_sae({}) for trainer in (whole, expected))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(sae, name), getattr(expected_sae, name), rtol=1e-3, atol=1e-5, msg=name)

    resumed = make_trainer(FUSED, device)
    resumed.load_state_dict(load_state(tmp_path, "sae", 2))
    train(resumed)
    ended = states(whole)
    for name, tensor in states(resumed).items():
        assert torch.equal(tensor, ended[name]), name


def test_a_run_resumes_by_another_path(device):
    begun = make_trainer(REFERENCE, device)
    train(begun, 1)
    trainers = [make_trainer(REFERENCE, device), make_trainer(FUSED, device)]
    for trainer in trainers:
        trainer.load_state_dict(begun.state_dict())
        train(trainer, 2)
    for name, tensor in trainers[0].parameters.items():
        torch.testing.assert_close(trainers[1].parameters[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.gpu
def test_in_bfloat16_two_runs_are_equal_and_near_the_references():
    runs = [make_trainer(FUSED, "cuda", dtype=torch.bfloat16) for _ in range(2)]
    metrics = [train(run) for run in runs]
    assert metrics[0] == metrics[1]
    first, second = (states(run) for run in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    expected = make_trainer(REFERENCE, "cuda", dtype=torch.bfloat16)
    assert metrics[0]["loss"] == pytest.approx(train(expected)["loss"], rel=0.05)


@pytest.mark.gpu
def test_divergence_is_noticed_when_the_host_asks():
    trainer = make_trainer(FUSED, "cuda")
    x = torch.full((BATCH, D_IN), float("nan"), device="cuda")
    trainer.step(Batch(x, x))
    trainer.step(Batch(x, x))
    assert trainer.diverged is None
    trainer.check()
    assert "at step 1" in str(trainer.diverged)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_trainers_memory_is_freed_with_it(device, fuse):
    """Without a cycle that only the garbage collector would find: a GPU's memory is full long before it runs."""
    trainer = make_trainer(FUSED, device, fuse)
    train(trainer, 2)
    copy = trainer.mode.step.W_enc.shadow if fuse else trainer.mode.W_enc_compute
    freed = [weakref.ref(thing) for thing in (trainer, trainer.parameters["W_dec"], copy)]
    gc.collect()
    gc.disable()
    try:
        del trainer, copy
        assert [reference() for reference in freed] == [None] * 3
    finally:
        gc.enable()


def test_the_fused_step_holds_each_matrix_in_bfloat16_once(device):
    trainer = make_trainer(FUSED, device, dtype=torch.bfloat16)
    gc.collect()
    shape = trainer.parameters["W_enc"].shape
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    held = {tensor.data_ptr() for tensor in tensors if (tensor.dtype, tensor.shape) == (torch.bfloat16, shape)}
    step = trainer.mode.step
    assert held == {step.W_enc.shadow.data_ptr(), step.W_dec.shadow.data_ptr()}
