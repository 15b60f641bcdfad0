"""The memory that a plan counts is what its trainers then hold, of every architecture; freed memory is kept."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from thresher.shared.core.config import load_config
from thresher.train import TrainConfig
from thresher.train.architectures import ARCHITECTURES
from thresher.train.lockstep import make_trainers
from thresher.train.parallel.layout import Layout
from thresher.train.plan import plan_run
from thresher.train.sweep.grids import expand_sweep

MIXED = Path(__file__).parents[2] / "configs" / "train" / "mixed.toml"
MORE = {"hook_point": "blocks.1.resid_post", "d_sae": 64, "name": "{architecture}-more"}
BATCH, WINDOW = 128, 1 << 16


@pytest.fixture
def store(array_store):
    hooks = ("blocks.1.resid_post", "blocks.2.resid_post")
    return array_store({hook: torch.randn(512, 16).bfloat16() for hook in hooks})


@pytest.fixture
def config():
    """Return the shipped sweep of every architecture, narrower, and what else makes an SAE hold more or less."""
    shipped = load_config(TrainConfig, MIXED, [])
    narrow = []
    for sae in expand_sweep(shipped.sae):
        changes = {"d_sae": 64, "k": 8, "p_anneal_steps": 10}
        given = {key: value for key, value in changes.items() if getattr(sae, key, None) is not None}
        narrow.append(msgspec.structs.replace(sae, **given))
    more = [
        {"k": 4, "k_anneal_steps": 10},
        {"architecture": "gated", "l1_coefficient": 1.0, "ema_decay": 0.9},
        {"architecture": "batch_topk", "k": 4, "ema_decay": 0.9},
    ]
    assert {sae.architecture for sae in narrow} == set(ARCHITECTURES)
    sae = [*narrow, *(MORE | table for table in more)]
    return msgspec.structs.replace(shipped, sae=sae, device="cpu", batch_size=BATCH, tokens=5000, window_bytes=WINDOW)


def bytes_of(tensors):
    """The bytes of the memory behind tensors, each piece counted once."""
    return sum({(s := tensor.untyped_storage()).data_ptr(): s.nbytes() for tensor in tensors}.values())


def test_the_plan_counts_what_trainers_hold(store, config):
    plan = plan_run(config, store, store.n_rows)
    held = gradients = 0
    for trainer in make_trainers(config, plan, store, Layout()):
        optimizer = trainer.mode.optimizer
        groups = (trainer.parameters, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.copies, trainer.averages)
        tensors = [tensor for group in (*groups, trainer.buffers) for tensor in group.values()]
        held += bytes_of([*tensors, trainer.mode.tokens_since_fired])
        gradients += bytes_of(trainer.parameters.values())
        assert plan.n_parameters[trainer.name] == sum(map(torch.numel, trainer.parameters.values()))
    window = 2 * min(WINDOW, 512 * 16 * 2)
    assert plan.memory_bytes == held + gradients + window + 2 * BATCH * 64


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of other C libraries nothing is asked")
@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "65536"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=65536"}, False),
    ],
)
def test_freed_memory_is_kept_unless_the_environment_has_a_say(environment, kept):
    program = """
import resource, torch
from thresher.train.memory import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    torch.zeros(10 << 20)
before = faults()
for _ in range(10):
    torch.zeros(10 << 20)
print(faults() - before)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True, check=True
    )
    pages_of_all = 10 * (40 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert (int(result.stdout) < pages_of_all / 2) == kept
