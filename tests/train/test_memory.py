"""The memory that a plan counts is what its trainers then hold, of every architecture; freed memory is kept."""

import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from thresher.shared.core.config import load_config
from thresher.train import TrainConfig
from thresher.train.architectures import ARCHITECTURES, make_architecture, make_config
from thresher.train.architectures.contract import Batch
from thresher.train.kernels.triton import Triton
from thresher.train.lockstep import make_trainers
from thresher.train.memory import sae_memory
from thresher.train.parallel.layout import Layout
from thresher.train.plan import plan_run
from thresher.train.step.fused_step import FusedStep
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization
from thresher.train.stream.rotation import Rotation
from thresher.train.sweep.grids import expand_sweep

from ..fake_cuda import DEVICE, fake_cuda

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
    places = sorted({place for sae in plan.saes for place in sae.wiring.hook_points})
    by = {place: Normalization(torch.zeros(16), 1.0, 16.0, rotation=Rotation((torch.eye(16),))) for place in places}
    trainers = make_trainers(config, plan, by, Layout())
    for trainer in trainers:
        optimizer = trainer.mode.optimizer
        groups = (trainer.parameters, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.copies, trainer.averages)
        tensors = [tensor for group in (*groups, trainer.buffers) for tensor in group.values()]
        held += bytes_of([*tensors, trainer.mode.tokens_since_fired])
        gradients += bytes_of(trainer.parameters.values())
        assert plan.n_parameters[trainer.name] == sum(map(torch.numel, trainer.parameters.values()))
    window = 2 * min(WINDOW, 512 * 16 * 2)
    memory = dict(plan.memory)
    batch = BATCH * (2 * 64 + 20 * max(trainer.architecture.d_in for trainer in trainers))
    assert (memory.pop("gradients"), memory.pop("windows"), memory.pop("batch")) == (gradients, window, batch)
    rotated = {trainer.normalization.rotation for trainer in trainers} - {None}
    wirings = [trainer.config.wiring for trainer in trainers]
    assert [t.normalization.rotation is not None for t in trainers] == [w.reads == w.writes for w in wirings]
    assert memory.pop("rotation") == bytes_of(V for rotation in rotated for V in rotation.axes)
    assert sum(memory.values()) == held
    assert plan.memory_bytes == held + gradients + window + batch + plan.memory["rotation"]


def test_the_plan_says_what_takes_the_memory_of_the_fullest_rank(store, config):
    """Of 3 ranks each holds a third of the latents, or a third of the rows of a batch."""
    config = msgspec.structs.replace(config, sae=[{"hook_point": "blocks.1.resid_post", "d_sae": 64, "k": 4}])
    ranks = SimpleNamespace(n=3, local_n=3, rank=0)
    plans = {}
    for parallel in ("data", "latents"):
        config = msgspec.structs.replace(config, parallel=parallel, batch_size=129)
        plans[parallel] = plan_run(config, store, store.n_rows, ranks)
    weights = {"data": 4 * (2 * 64 * 16 + 64 + 16), "latents": 4 * (2 * 22 * 16 + 22 + 16)}
    assert {name: plan.memory["weights"] for name, plan in plans.items()} == weights
    assert {name: plan.memory["moments"] for name, plan in plans.items()} == {k: 2 * v for k, v in weights.items()}
    assert plans["data"].memory["batch"] == 43 * (2 * 64 + 20 * 16)
    assert plans["latents"].memory["batch"] == 129 * (2 * 22 + 20 * 16)
    assert "memory of the process that needs most, in GiB: weights 0.00, moments" in plans["latents"].describe()


def test_on_a_gpu_steps_of_several_saes_share_the_memory_of_gradients(store, config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    table = {"hook_point": "blocks.1.resid_post", "architecture": "standard", "l1_coefficient": 1.0}
    wide, narrow = table | {"d_sae": 64, "name": "wide"}, table | {"d_sae": 32, "name": "narrow"}
    fused = {"hook_point": "blocks.1.resid_post", "architecture": "topk", "d_sae": 128, "k": 4}
    config = msgspec.structs.replace(config, sae=[wide, narrow, fused], device="cuda")
    memory = plan_run(config, store, store.n_rows).memory
    assert memory["gradients"] == 4 * (2 * 64 * 16 + 64 + 16)
    assert memory["weights"] == 4 * (2 * 224 * 16 + 224 + 3 * 16)


def bytes_held(trainer):
    """Return the bytes of the memory behind all tensors that a trainer holds, each piece counted once."""
    mode = trainer.mode
    groups = [trainer.parameters, trainer.averages, trainer.buffers, mode.exp_avg, mode.exp_avg_sq]
    tensors = [tensor for group in groups for tensor in group.values()] + [mode.tokens_since_fired]
    if isinstance(mode, FusedStep):
        tensors += [getattr(mode.step, name).shadow for name in trainer.parameters]
    else:
        tensors += mode.optimizer.copies.values()
    return sum({(s := tensor.untyped_storage())._cdata: s.nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize(
    ("path", "recipe", "d_in", "d_sae", "n_shards", "gib"),
    [
        ("fused", {"architecture": "topk", "k": 32}, 768, 24_576, 1, 0.492),
        ("fused", {"architecture": "topk", "k": 64}, 4096, 131_072, 1, 14.003),
        ("ops", {"architecture": "batch_topk", "k": 64, "ema_decay": 0.999}, 4096, 131_072, 1, 17.003),
        ("fused", {"architecture": "topk", "k": 64}, 4096, 1 << 20, 8, 14.003),
    ],
)
def test_the_memory_of_large_saes_is_what_arithmetic_says(path, recipe, d_in, d_sae, n_shards, gib):
    """Of a million latents 131,072 are on each of 8 GPUs; gradients and a batch come on top."""
    ranks = SimpleNamespace(n=n_shards, rank=n_shards - 1, part=lambda n: slice((n_shards - 1) * n // n_shards, n))
    layout = Layout(ranks, "latents")
    config = make_config(hook_point="x", d_sae=d_sae, **recipe)
    with fake_cuda():
        trainer = SaeTrainer(
            config=config,
            d_in=d_in,
            normalization=Normalization(torch.zeros(d_in), 1.0, float(d_in)),
            schedule=Schedule(1000, 4096, 1, 0.5),
            kernels=Triton(),
            device=DEVICE,
            across=layout.across,
            shard=layout.shard,
        )
        held = bytes_held(trainer)
    memory = sae_memory(make_architecture(config, d_in), "bfloat16", path, n_shards)
    assert sum(memory._replace(gradients=0)) == held
    assert held / 2**30 == pytest.approx(gib, abs=0.001)
    assert memory.gradients == (0 if path == "fused" else memory.weights)


class Peak(TorchDispatchMode):
    """Counts the bytes on the device of tensors that operations make, while they are alive, and remembers the most."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self._alive = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
        self.now = sum(self._alive.values())
        self.most = max(self.most, self.now)
        return found

    def _freed(self, key):
        del self._alive[key]


@pytest.mark.parametrize(
    ("d_in", "d_sae", "k", "n_shards", "n_dead", "most_gib"),
    [
        pytest.param(768, 24_576, 32, 1, 384, 0.27, id="AuxK"),
        pytest.param(4096, 131_072, 64, 1, 0, 1.57, id="wide"),
        pytest.param(4096, 8192, 128, 1, 0, 0.65, id="many entries of few latents"),
        pytest.param(4096, 1 << 20, 64, 8, 2048, 1.57, id="a million latents on 8 GPUs"),
    ],
)
def test_a_fused_step_takes_no_more_than_the_plan_counts(
    array_store, monkeypatch, d_in, d_sae, k, n_shards, n_dead, most_gib
):
    """At the sizes that matter, on tensors without values: what a step makes, with the batch that it is given."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda *arguments, **options: None)
    batch = 4096
    ranks = SimpleNamespace(
        n=n_shards,
        local_n=n_shards,
        rank=0,
        part=lambda length: slice(0, length // n_shards),
        add=lambda *totals: None,
        stack=lambda *own: tuple(one.new_empty(n_shards, *one.shape) for one in own),
    )
    sae = {"hook_point": "x", "architecture": "topk", "d_sae": d_sae, "k": k}
    config = TrainConfig(
        store="x", output="o", tokens=1 << 20, batch_size=batch, device="cuda", parallel="latents", sae=[sae]
    )
    with monkeypatch.context() as a_gpu:
        a_gpu.setattr(torch.cuda, "is_available", lambda: True)
        a_gpu.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
        a_gpu.setattr(torch.cuda, "get_device_name", lambda device: "an H100")
        plan = plan_run(config, array_store({"x": torch.randn(64, d_in).bfloat16()}), 64, ranks)
        told = plan.describe()
    layout = Layout(ranks, "latents")
    with fake_cuda():
        trainer = SaeTrainer(
            config=make_config(**sae),
            d_in=d_in,
            normalization=Normalization(torch.zeros(d_in), 1.0, float(d_in)),
            schedule=Schedule(1000, batch, 1, 0.5),
            kernels=Triton(),
            device=DEVICE,
            across=layout.across,
            shard=layout.shard,
        )
        assert isinstance(trainer.mode, FusedStep)
        trainer.mode.dead.n_dead, trainer.mode.dead.next_poll = n_dead, 1 << 60
        trainer._initialised = True
        rows = torch.randn(batch, d_in, device=DEVICE)
        given = Batch(rows, rows.to(torch.bfloat16))
        with Peak() as peak:
            trainer.step(given)
        assert peak.now < peak.most / 4, "what a step makes is freed after it"
    # As stored, in float32 before and after rotation, and in the compute dtype.
    needed = (2 + 4 + 4 + 2) * rows.numel() + peak.most
    assert plan.memory["batch"] / 8 < needed <= plan.memory["batch"] < most_gib * 2**30
    assert f"batch {plan.memory['batch'] / 2**30:.2f}" in told
    if n_shards == 8:
        assert "memory of the process that needs most, in GiB: weights 4.00, moments 8.00, copies 2.00" in told


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
