"""TopK's fused step on several processes: Triton's kernels, interpreted, train what one process and operations do."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from thresher.shared import ActivationStoreWriter
from thresher.shared.core.config import to_toml
from thresher.train import TrainConfig, train
from thresher.train.kernels.entries import packed_positive
from thresher.train.plan import plan_run
from thresher.train.sweep.grids import expand_sweep

DRIVER = Path(__file__).with_name("parallel_driver.py")
SAE = {"architecture": "topk", "hook_point": "x", "d_sae": 13, "k": 2, "lr": 1e-2, "name": "sae"}
SAE |= {"dead_after_tokens": 12, "k_aux": 3, "aux_coefficient": 1.0, "clip_grad_norm": 0.1}
BATCH, N_STEPS = 6, 6
SPEC = importlib.util.spec_from_file_location("parallel_driver", DRIVER)
driver = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(driver)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sparse_activations):
    """Return the folder of runs: of one process by operations and by fused steps, and of several processes.

    2 processes begin, and are killed after a checkpoint; 3 end the run, and in a copy 1 does.
    """
    folder = tmp_path_factory.mktemp("fused")
    x = sparse_activations[: 10 * 8, :8].view(10, 8, 8)
    with ActivationStoreWriter(folder / "store", {"x": 8}, 8) as writer:
        writer.append({"x": x}, held_out=np.zeros(10, bool))
    config = TrainConfig(
        store=str(folder / "store"),
        output=str(folder / "operations"),
        batch_size=BATCH,
        tokens=BATCH * N_STEPS,
        warmup_steps=1,
        checkpoint_every_tokens=BATCH * 2,
        window_bytes=1 << 18,
        compute_dtype="float32",
        device="cpu",
        sae=expand_sweep([SAE]),
    )
    train(config)
    with driver.interpreted():
        train(msgspec.structs.replace(config, output=str(folder / "alone")))
    begun = {parallel: save(config, folder / "two" / parallel, parallel) for parallel in ("data", "latents")}
    codes, said = run_ranks(2, folder / "meeting-2", *(f"{path}@4" for path in begun.values()))
    assert codes == [0, 0], said
    for parallel in begun:
        assert json.loads((folder / "two" / parallel / "checkpoint.json").read_text())["step"] == 2
        for end in ("three", "one"):
            shutil.copytree(folder / "two" / parallel, folder / end / parallel)
    codes, said = run_ranks(3, folder / "meeting-3", *(save(config, folder / "three" / name, name) for name in begun))
    assert codes == [0, 0, 0], said
    with driver.interpreted():
        for parallel in begun:
            train(msgspec.structs.replace(config, output=str(folder / "one" / parallel), parallel=parallel))
    return SimpleNamespace(folder=folder, config=config)


def save(config, output, parallel):
    """Write a configuration for another output and return the file."""
    path = output.with_suffix(".toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(msgspec.structs.replace(config, output=str(output), parallel=parallel)))
    return path


def run_ranks(n, *arguments):
    """Run the driver for so many processes with interpreted kernels; return their exit codes and what they said."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(n), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "INTERPRETED": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return [int(code) for code in done.stdout.split()], done.stderr


def numbers(output):
    lines = [json.loads(line) for line in (output / "sae" / "metrics.jsonl").read_text().splitlines()]
    timing = ("tokens_per_second", "data_wait_fraction")
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


@pytest.mark.parametrize("run", ["alone", "three/data", "three/latents", "one/data", "one/latents"])
def test_fused_steps_of_several_processes_train_what_operations_do(runs, run):
    expected = load_file(runs.folder / "operations" / "sae" / "sae_weights.safetensors")
    found = load_file(runs.folder / run / "sae" / "sae_weights.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    lines, wanted = numbers(runs.folder / run), numbers(runs.folder / "operations")
    assert [line["step"] for line in lines] == list(range(1, N_STEPS + 1))
    for line, want in zip(lines, wanted, strict=True):
        # By fused steps AuxK's loss is there, and zero, before a latent is dead.
        assert {"auxk_loss": 0.0} | line == pytest.approx({"auxk_loss": 0.0} | want, rel=1e-3, abs=1e-6)
    assert wanted[-1]["auxk_loss"] > 0
    assert max(line["grad_norm"] for line in wanted) > 0.1


def test_a_rank_that_dies_in_fused_steps_leaves_one_line(runs, tmp_path):
    codes, said = run_ranks(2, "SIGKILL", save(runs.config, tmp_path / "died", "data"), 3)
    assert codes == [2, -signal.SIGKILL]
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "another process of this run stopped" in error
    assert "Traceback" not in said


def test_positive_entries_are_packed_in_order():
    acts = torch.tensor([[0.0, 2.0, -torch.inf], [-torch.inf, 0.0, -1.0], [3.0, 0.5, 1.0]])
    indices = torch.arange(9, dtype=torch.int32).view(3, 3)
    values, latents, offsets = packed_positive(acts, indices)
    assert values.tolist() == [2.0, 3.0, 0.5, 1.0, 0, 0, 0, 0, 0]
    assert latents[:4].tolist() == [1, 6, 7, 8]
    assert offsets.tolist() == [0, 1, 1, 4]


@pytest.mark.parametrize(
    ("changes", "n", "line"),
    [
        ({}, 1, "steps: fused kernels; in CUDA graphs"),
        ({"cuda_graphs": False}, 1, "steps: fused kernels; no CUDA graphs (cuda_graphs = false)"),
        ({"parallel": "spread"}, 1, "steps: fused kernels; in CUDA graphs"),
        (
            {"parallel": "data"},
            2,
            "steps: fused kernels; no CUDA graphs (parallel = 'data' exchanges tensors",
        ),
        ({"parallel": "latents"}, 2, "steps: fused kernels; no CUDA graphs (parallel = 'latents' exchanges tensors"),
        ({"device": "cpu"}, 1, "steps: operation by operation (kernels 'cpu' have no fused step)"),
        ({"kernels": "reference"}, 1, "steps: operation by operation (kernels 'reference' have no fused step)"),
        ({"weight_decay": 0.1}, 1, "steps: operation by operation (weight_decay is given); in CUDA graphs"),
        ({"unit_norm_decoder": False}, 1, "steps: operation by operation (unit_norm_decoder = false); in CUDA graphs"),
        (
            {"architecture": "batch_topk"},
            1,
            "steps: operation by operation (only plain topk has fused kernels); in CUDA",
        ),
        ({"writes": ["y"]}, 1, "steps: operation by operation (it writes another hook point than it reads); in CUDA"),
        ({"k_anneal_steps": 5}, 1, "steps: operation by operation (only plain topk has fused kernels); in CUDA"),
    ],
)
def test_the_plan_says_how_steps_run(array_store, monkeypatch, changes, n, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    store = array_store({hook: torch.randn(512, 16).bfloat16() for hook in ("x", "y")})
    of_run = {key: value for key, value in changes.items() if key in TrainConfig.__struct_fields__}
    sae = SAE | {key: value for key, value in changes.items() if key not in of_run}
    if "writes" in sae:
        sae["reads"] = [sae.pop("hook_point")]
    config = TrainConfig(**{"store": "x", "output": "o", "tokens": 50_000, "device": "cuda", "sae": [sae]} | of_run)
    ranks = SimpleNamespace(n=n, local_n=n, rank=0)
    (found,) = [text for text in plan_run(config, store, 512, ranks).describe().splitlines() if "steps:" in text]
    assert found.startswith(line)


def test_ranks_that_share_a_batch_count_the_rows_they_exchange(array_store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    store = array_store({"x": torch.randn(512, 16).bfloat16()})
    config = TrainConfig(store="x", output="o", tokens=5000, batch_size=128, device="cuda", parallel="data", sae=[SAE])
    memory = plan_run(config, store, 512, SimpleNamespace(n=4, local_n=4, rank=0)).memory
    assert memory["batch"] == 32 * (2 * 13 + 20 * 16) + 96 * (6 * 16 + 12 * 2) + 4 * 16 * (2 * 4 + 1)
    assert memory["rotation"] == 4 * 16 * 16
    assert memory["gradients"] == 0
