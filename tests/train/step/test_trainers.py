"""Steps of a sweep's SAEs: in which order they are taken, and in which told."""

from __future__ import annotations

import torch

from thresher.shared.core.compute.cores import single_threaded_operators
from thresher.train.architectures import make_config
from thresher.train.kernels import kernels_for
from thresher.train.lockstep import prepare_batches, step_all
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization


def test_steps_that_took_longest_come_first_and_are_reported_in_the_order_of_the_sweep(monkeypatch):
    taken = []
    step = SaeTrainer.step
    monkeypatch.setattr(SaeTrainer, "step", lambda self, batch: taken.append(self.name) or step(self, batch))
    trainers = [
        SaeTrainer(
            config=make_config(name=name, hook_point="h", architecture="topk", d_sae=12, k=2),
            d_in=6,
            normalization=Normalization(torch.zeros(6), 1.0, 6.0),
            schedule=Schedule(10, 8, 0, 0.0),
            kernels=kernels_for("cpu"),
        )
        for name in ("a", "b", "c")
    ]
    prepared = prepare_batches({"h": torch.randn(8, 6)}, trainers)
    with single_threaded_operators():
        assert list(step_all(trainers, prepared)) == taken == ["a", "b", "c"]
        assert all(trainer.seconds > 0 for trainer in trainers)
        for trainer, seconds in zip(trainers, (2.0, 1.0, 3.0), strict=True):
            trainer.seconds = seconds
        assert list(step_all(trainers, prepared)) == ["a", "b", "c"]
    assert taken[3:] == ["c", "a", "b"]
