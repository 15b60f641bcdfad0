"""A short training run through the trainer is the same on the kernels and on the references."""

from __future__ import annotations

import torch

from thresher.train.architectures.base import Batch
from thresher.train.config import SaeConfig
from thresher.train.kernels import fused, reference
from thresher.train.normalization import Normalization
from thresher.train.sae_trainer import SaeTrainer, Schedule

D_IN, BATCH, N_STEPS = 24, 4, 3


def train(kernels, device):
    config = SaeConfig(hook_point="x", d_sae=17, architecture="topk", k=2, lr=1e-2, clip_grad_norm=1.0)
    normalization = Normalization(torch.zeros(D_IN), 1.0, float(D_IN))
    trainer = SaeTrainer(config, D_IN, normalization, Schedule(N_STEPS, BATCH, 1, 0.2), kernels, torch.float32, device)
    # Far from Adam's own, with which the last bit of a gradient near zero decides which way a weight goes.
    trainer.optimizer.eps = 1e-4
    generator = torch.Generator().manual_seed(0)
    for _ in range(N_STEPS):
        x = torch.randn(BATCH, D_IN, generator=generator).to(device)
        metrics = trainer.step(Batch(x, x))
    return trainer.parameters, metrics


def test_a_training_run_is_that_of_the_references(device):
    expected, expected_metrics = train(reference, device)
    found, metrics = train(fused, device)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(torch.tensor(metrics["loss"]), torch.tensor(expected_metrics["loss"]))
