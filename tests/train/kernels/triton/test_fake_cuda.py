"""Steps of every architecture on tensors that claim to be on a GPU: no tensor of the CPU among them, and no wait."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from thresher.train.architectures import ARCHITECTURES, make_config
from thresher.train.architectures.contract import Batch
from thresher.train.kernels import triton as fused
from thresher.train.step.fused_step import FusedStep
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.gpu_windows import QuantisedRows, take_rows
from thresher.train.stream.normalization import Normalization

from ....fake_cuda import DEVICE, WaitsForTheDevice, fake_cuda

D_IN, D_SAE, BATCH = 12, 24, 4
ALWAYS = {"sparsity_warmup_steps": 6}
RECIPES = {
    "topk": {"k": 3},
    "clipped topk": {"architecture": "topk", "k": 3, "clip_grad_norm": 1.0, "ema_decay": 0.9},
    "free topk": {"architecture": "topk", "k": 3, "unit_norm_decoder": False},
    "decayed topk": {"architecture": "topk", "k": 3, "weight_decay": 0.1},
    "annealed topk": {"architecture": "topk", "k": 1, "k_anneal_steps": 2, "multi_topk_coefficient": 0.25},
    "batch_topk": {"k": 3},
    "matryoshka_batch_topk": {"k": 3, "prefix_sizes": (8, 24)},
    "hierarchical_topk": {"k": 2},
    "random": {"k": 4},
    "lista_matryoshka": {"k": 3, "prefix_sizes": (8, 24)},
    "matching_pursuit": {"k": 3},
    "frozen topk": {"architecture": "topk", "k": 4, "freeze": ("W_dec",)},
    "standard": {"l1_coefficient": 0.3, "clip_grad_norm": 1.0},
    "annealed standard": {"architecture": "standard", "l1_coefficient": 0.3, "p_final": 0.4, "p_anneal_steps": 6},
    "gated": {"l1_coefficient": 0.3},
    "jumprelu": {"l0_coefficient": 0.05} | ALWAYS,
    "tanh jumprelu": {"architecture": "jumprelu", "l0_coefficient": 0.05, "sparsity_loss": "tanh", "bandwidth": 0.2},
    "transcoder": {"l1_coefficient": 0.3, "hook_point_out": "y"},
    "skip_transcoder": {"l1_coefficient": 0.3, "hook_point_out": "y"},
    "crosscoder": {"l1_coefficient": 0.3, "hook_point": "x", "hook_points": ("x", "y")},
}


@pytest.fixture
def launches(monkeypatch):
    """Replace launches by a check of where their tensors are; return the names of the kernels."""
    names = []

    def check(self, *args, **kwargs):
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, torch.Tensor):
                assert str(argument.device) == DEVICE, self.fn.__name__
        names.append(self.fn.__name__)

    monkeypatch.setattr(GridExecutor, "__call__", check)
    return names


def make_trainer(name):
    recipe = RECIPES[name]
    config = make_config(
        **{"hook_point": "x", "architecture": name, "d_sae": D_SAE, "dead_after_tokens": BATCH} | recipe
    )
    out = Normalization(torch.zeros(D_IN), 1.0, float(D_IN)) if "hook_point_out" in recipe else None
    normalization = Normalization(torch.zeros(D_IN), 1.0, float(D_IN), out)
    return SaeTrainer(
        config=config,
        d_in=D_IN,
        normalization=normalization,
        schedule=Schedule(1000, BATCH, 1, 0.5),
        kernels=fused.Triton(),
        device=DEVICE,
    )


def settle(trainer):
    """Set what polls would have found, and let none come: room for entries, and AuxK for dead latents."""
    mode = trainer.mode
    dead, room = (mode.dead, None) if isinstance(mode, FusedStep) else (mode.parts.polls.dead, mode.parts.polls.room)
    if dead is not None:
        dead.n_dead, dead.next_poll = 8, 1 << 60
    if room is not None:
        room.capacity, room.next_poll, room.asked = 64, 1 << 60, True


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_has_no_tensor_of_the_cpu_and_waits_for_nothing(launches, name):
    with fake_cuda():
        trainer = make_trainer(name)
        settle(trainer)
        trainer._initialised = True  # what a first batch decides may wait
        x = torch.randn(BATCH, D_IN, device=DEVICE)
        y = torch.randn(BATCH, D_IN, device=DEVICE) if "hook_point_out" in RECIPES[name] else None
        for _ in range(2):
            metrics = trainer.step(Batch(x, x.to(torch.bfloat16), y))
    assert bool(launches) is (name != "matching_pursuit")  # its operations are PyTorch's
    assert all(str(tensor.device) == DEVICE for tensor in trainer.parameters.values())
    assert all(str(value.device) == DEVICE for value in metrics.values() if isinstance(value, torch.Tensor))
    assert isinstance(trainer.mode, FusedStep) is (name in ("topk", "clipped topk"))


def test_every_architecture_but_those_across_layers_is_here():
    here = {recipe.get("architecture", name) for name, recipe in RECIPES.items()}
    assert {name for name in ARCHITECTURES if "cross_layer" not in name} <= here


def test_a_batch_of_an_int8_window_is_gathered_on_the_gpu(launches):
    with fake_cuda():
        rows = QuantisedRows(
            torch.zeros(16, D_IN, dtype=torch.int8, device=DEVICE), torch.ones(16, device=DEVICE), torch.bfloat16
        )
        found = take_rows(rows, torch.arange(4, device=DEVICE))
        mean = torch.zeros(D_IN, device=DEVICE)
        x, x_compute = fused.Triton.normalise(found, mean, 0.5)
    assert launches == ["rows_kernel"] * 2
    assert {str(tensor.device) for tensor in (found, x, x_compute)} == {DEVICE}


def test_what_a_gpu_refuses_or_waits_for_is_found():
    with fake_cuda():
        x = torch.randn(4, 3, device=DEVICE)
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(4, 3)
        for waiting in (
            lambda: x[x > 0],
            lambda: x.nonzero(),
            lambda: torch.bincount(x.long().flatten()),
            lambda: float(x.sum()),
        ):
            with pytest.raises(WaitsForTheDevice):
                waiting()
        x[x > 0] = 0
        assert x[1:, None, 0].shape == (3, 1)
        assert x[..., torch.zeros(2, dtype=torch.long, device=DEVICE)].shape == (4, 2)
