"""Several processes train what one does: a sweep spread over them, each SAE data-parallel, or its latents sharded."""

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

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.config import to_toml
from thresher.shared.core.errors import ConfigError
from thresher.train import TrainConfig, train
from thresher.train.parallel.layout import Layout, spread, trained_on
from thresher.train.parallel.ranks import Agreement, TrainRanks
from thresher.train.plan import plan_run
from thresher.train.sweep.grids import expand_sweep

DRIVER = Path(__file__).with_name("parallel_driver.py")
IN, OUT = "blocks.0.mlp_in", "blocks.0.mlp_out"
TOPK = {"architecture": "topk", "hook_point": IN, "d_sae": 97, "k": 4, "lr": 3e-3, "dead_after_tokens": 240}
L1 = {"hook_point": IN, "d_sae": 64, "l1_coefficient": 0.3, "lr": 3e-3}
CROSS_LAYER = {"cross_layer": True, "reads": [IN, OUT], "writes": [OUT, IN], "lr": 3e-3}
SWEEP = [
    TOPK,
    TOPK | {"name": "topk-clipped", "clip_grad_norm": 0.01, "ema_decay": 0.9},
    TOPK | {"architecture": "batch_topk"},
    TOPK | {"name": "topk-skip", "hook_point": None, "reads": [IN], "writes": [OUT], "skip": True},
    TOPK
    | {"name": "batch_topk-skip", "architecture": "batch_topk"}
    | {"hook_point": None, "reads": [IN], "writes": [OUT], "skip": True},
    TOPK | {"name": "topk-resampled", "aux_coefficient": 0.0, "resample_every_tokens": 960},
    TOPK | {"name": "topk-annealed", "k_anneal_steps": 12, "multi_topk_coefficient": 0.125},
    TOPK | {"architecture": "matryoshka_batch_topk", "prefix_sizes": [24, 97]},
    TOPK | {"architecture": "hierarchical_topk"},
    L1 | {"architecture": "jumprelu", "l0_coefficient": 0.02, "l1_coefficient": None, "target_l0": 5.0},
    L1 | {"architecture": "gated", "initial_l0": 6.0},
    L1 | {"architecture": "standard"},
    L1 | {"name": "standard-p", "architecture": "standard", "p_final": 0.5, "p_anneal_steps": 12},
    L1 | {"architecture": "transcoder", "hook_point_out": OUT},
    L1 | {"architecture": "crosscoder", "hook_point": None, "hook_points": [IN, OUT]},
    TOPK | {"name": "topk-many", "k": 40},
    CROSS_LAYER | {"architecture": "batch_topk", "d_sae": 49, "k": 6, "dead_after_tokens": 240},
]
"""One of each architecture, and of what a step does beside: a width that no number of ranks divides, dead latents.

With 4 latents per row, ranks exchange entries; with 40, gradients.
"""
SHARDED = SWEEP[:5]


@pytest.fixture(scope="module")
def configs(tmp_path_factory, sparse_activations):
    """Return a configuration for each way, and train what one process makes of it."""
    folder = tmp_path_factory.mktemp("parallel")
    x = sparse_activations[: 372 * 16].view(372, 16, 32)
    with ActivationStoreWriter(folder / "store", {IN: 32, OUT: 32}, 16) as writer:
        writer.append({IN: x, OUT: 2 * x.roll(1, -1)}, held_out=np.arange(372) % 5 == 0)

    def config(parallel, saes, dtype):
        tables = [{key: value for key, value in sae.items() if value is not None} for sae in saes]
        return TrainConfig(
            store=str(folder / "store"),
            output=str(folder / "alone" / parallel),
            batch_size=120,
            tokens=120 * 24,
            warmup_steps=5,
            checkpoint_every_tokens=120 * 6,
            window_bytes=1 << 18,
            compute_dtype=dtype,
            device="cpu",
            parallel=parallel,
            sae=expand_sweep(tables),
        )

    made = {
        "spread": config("spread", SWEEP, "bfloat16"),
        "data": config("data", SWEEP, "float32"),
        "latents": config("latents", SHARDED, "float32"),
    }
    for one in made.values():
        train(one)
    return made


def save(config, output):
    """Write a configuration for another output and return the file and the output."""
    path = output.with_suffix(".toml")
    output.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(msgspec.structs.replace(config, output=str(output))))
    return path


def run_ranks(n, *arguments):
    """Run the driver for so many processes; return their exit codes and what they said."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(n), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return [int(code) for code in done.stdout.split()], done.stderr


@pytest.fixture(scope="module")
def outputs(configs, tmp_path_factory):
    """Let 2 processes begin, 3 go on to the end, and in a copy 3 go on for a while and 1 finish."""
    folder = tmp_path_factory.mktemp("ranks")
    begun = {name: folder / "two" / name for name in configs}
    arguments = [f"{save(config, begun[name])}@10" for name, config in configs.items()]
    codes, said = run_ranks(2, folder / "meeting-2", *arguments)
    assert codes == [0, 0], said
    arguments = []
    for name, config in configs.items():
        for kind, step in (("three", ""), ("one", "@9")):
            shutil.copytree(begun[name], folder / kind / name)
            arguments.append(f"{save(config, folder / kind / name)}{step}")
    codes, said = run_ranks(3, folder / "meeting-3", *arguments)
    assert codes == [0, 0, 0], said
    for name, config in configs.items():
        assert json.loads((folder / "one" / name / "checkpoint.json").read_text())["step"] == 12
        train(msgspec.structs.replace(config, output=str(folder / "one" / name)))
    return folder


def numbers(folder):
    timing = ("tokens_per_second", "data_wait_fraction")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


@pytest.mark.parametrize("last", ["three", "one"])
def test_saes_spread_over_ranks_are_bitwise_those_of_one_process(configs, outputs, last):
    alone = Path(configs["spread"].output)
    folders = sorted(path.parent for path in alone.glob("*/cfg.json"))
    assert len(folders) == len(SWEEP)
    for folder in folders:
        found = outputs / last / "spread" / folder.name
        for name in ("sae_weights.safetensors", "cfg.json"):
            assert (found / name).read_bytes() == (folder / name).read_bytes(), folder.name
        assert numbers(found) == numbers(folder)


@pytest.mark.parametrize("parallel", ["data", "latents"])
@pytest.mark.parametrize("last", ["three", "one"])
def test_an_sae_trained_by_all_ranks_is_that_of_one_process(configs, outputs, parallel, last):
    alone = Path(configs[parallel].output)
    folders = sorted(path.parent for path in alone.glob("*/cfg.json"))
    assert len(folders) == len(configs[parallel].sae)
    for folder in folders:
        found = outputs / last / parallel / folder.name
        weights, expected = (load_file(path / "sae_weights.safetensors") for path in (found, folder))
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{folder.name} {name}")
        lines, wanted = numbers(found), numbers(folder)
        assert [line["step"] for line in lines] == list(range(1, 25))
        for line, want in zip(lines, wanted, strict=True):
            assert line == pytest.approx(want, rel=1e-3, abs=1e-6), folder.name


def test_the_sweep_has_dead_latents_and_clipped_gradients(configs):
    """What the comparisons above are for happens in them."""
    alone = Path(configs["latents"].output)
    lines = [line for path in alone.glob("*topk*") for line in numbers(path)]
    assert any(line.get("auxk_loss", 0) > 0 for line in lines)
    assert any(line.get("grad_norm", 0) > 0.01 for line in lines)


def test_checkpoints_and_records_are_written_once(configs, outputs):
    for name in configs:
        left = [path for path in (outputs / "three" / name).rglob("*") if path.name.endswith(".partial")]
        assert left == []
        assert json.loads((outputs / "three" / name / "checkpoint.json").read_text())["finished"]
        steps = {path.name for path in (outputs / "one" / name).glob("*/checkpoints/*")}
        assert steps == {"step-000000018.safetensors", "step-000000024.safetensors"}


@pytest.mark.parametrize("parallel", ["spread", "data", "latents"])
def test_a_rank_that_dies_stops_the_run_with_one_line_and_it_resumes(configs, tmp_path, parallel):
    config = msgspec.structs.replace(configs[parallel], output=str(tmp_path / "died"), sae=configs[parallel].sae[:2])
    path = save(config, tmp_path / "died")
    codes, said = run_ranks(2, "SIGKILL", path)
    assert codes == [2, -signal.SIGKILL]
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "another process of this run stopped" in error
    assert "run the same command again" in error
    assert "Traceback" not in said
    assert json.loads((tmp_path / "died" / "checkpoint.json").read_text())["step"] == 12
    for folder in train(config):
        whole = Path(configs[parallel].output) / folder.name
        weights, expected = (load_file(path / "sae_weights.safetensors") for path in (folder, whole))
        for name, tensor in expected.items():
            if parallel == "spread":
                assert torch.equal(weights[name], tensor), name
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{folder.name} {name}")


def test_a_signal_to_one_rank_stops_all_after_the_same_step(configs, tmp_path):
    config = msgspec.structs.replace(configs["spread"], output=str(tmp_path / "stopped"), sae=configs["spread"].sae[:2])
    path = save(config, tmp_path / "stopped")
    codes, said = run_ranks(2, "SIGTERM", path)
    assert sorted(codes) == [2, 128 + signal.SIGINT]
    assert said.count("interrupted; run the same command again to resume") == 1
    step = json.loads((tmp_path / "stopped" / "checkpoint.json").read_text())["step"]
    assert 17 <= step < 24
    assert {len(numbers(tmp_path / "stopped" / str(sae.name))) for sae in config.sae} == {step}
    for folder in train(config):
        whole = Path(configs["spread"].output) / folder.name
        assert (folder / "sae_weights.safetensors").read_bytes() == (whole / "sae_weights.safetensors").read_bytes()


def test_saes_are_spread_by_cost():
    assert spread([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert spread([1, 2, 3, 10], 2) == [1, 1, 1, 0]
    assert spread([5, 5, 4, 3, 3], 3) == [0, 1, 2, 2, 0]


def test_which_saes_a_rank_trains():
    assert trained_on("spread", [5, 3, 2, 1], 2) == [[0, 3], [1, 2]]
    assert trained_on("data", [5, 3], 2) == trained_on("latents", [5, 3], 2) == [[0, 1], [0, 1]]


def test_fewer_saes_than_ranks_are_refused():
    ranks = SimpleNamespace(n=3, rank=0)
    with pytest.raises(ConfigError, match=r"3 processes have 2 SAEs to train.*parallel = 'data' or 'latents'"):
        Layout.of("spread", {"a": 1, "b": 2}, ranks)
    assert Layout.of("data", {"a": 1, "b": 2}, ranks).batch_slice == (0, 3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (L1 | {"architecture": "gated"}, "plain topk and batch_topk, but not architecture 'gated'"),
        (TOPK | {"k_anneal_steps": 9}, "but not its k or loss"),
        (TOPK | {"resample_every_tokens": 9}, "cannot resample"),
    ],
)
def test_what_cannot_be_sharded_is_refused(configs, table, message):
    config = msgspec.structs.replace(configs["latents"], sae=[table])
    store = ActivationStore.open(config.store)
    with pytest.raises(ConfigError, match=message):
        plan_run(config, store, 1000, SimpleNamespace(n=2, local_n=2))
    assert plan_run(config, store, 1000).n_ranks == 1


def test_one_process_decides_for_itself():
    agreement = Agreement(TrainRanks())
    assert agreement.ask(stop=True, trains=True) == (True, False)
    assert agreement.ask(stop=False, trains=False) == (False, True)
    agreement.settle()
