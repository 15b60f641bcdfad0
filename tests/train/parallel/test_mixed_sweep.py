"""Fourteen SAEs of every architecture in one sweep: killed, they resume to the same end, and are evaluated together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.shared import ActivationStoreWriter
from thresher.shared.core.config import load_config, to_toml
from thresher.train import TrainConfig, train
from thresher.train.sweep.grids import expand_sweep

ROOT = Path(__file__).parents[3]
DRIVER = Path(__file__).with_name("parallel_driver.py")


@pytest.fixture
def config(tmp_path):
    """Return the shipped configuration for a small store of its two hook points, with fewer latents and tokens."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 128, 48, generator=generator).unbind()
    codes = torch.rand(40_000, 128, generator=generator)
    codes *= torch.rand(40_000, 128, generator=generator) < 0.05
    places = {"blocks.1.resid_post": codes @ first + 1, "blocks.2.resid_post": codes @ (first + second) - 1}
    with ActivationStoreWriter(tmp_path / "store", dict.fromkeys(places, 48), 16) as writer:
        rows = {name: x.bfloat16().view(-1, 16, 48) for name, x in places.items()}
        writer.append(rows, held_out=np.arange(2500) % 10 == 0)
    shipped = load_config(TrainConfig, ROOT / "configs" / "train" / "mixed.toml", [])
    return msgspec.structs.replace(
        shipped,
        store=str(tmp_path / "store"),
        output=str(tmp_path / "whole"),
        device="cpu",
        batch_size=512,
        tokens=512 * 150,
        checkpoint_every_tokens=512 * 6,
        window_bytes=1 << 20,
        sae=[narrow(sae) for sae in expand_sweep(shipped.sae)],
    )


def narrow(sae):
    changes = {"d_sae": 256, "k": 8, "p_anneal_steps": 100}
    given = {key: value for key, value in changes.items() if getattr(sae, key, None) is not None}
    return msgspec.structs.replace(sae, **given)


@pytest.mark.long
def test_a_mixed_sweep_is_killed_resumes_and_is_evaluated(config, tmp_path):
    whole = train(config)
    assert len(whole) == 12
    cut = msgspec.structs.replace(config, output=str(tmp_path / "cut"))
    path = tmp_path / "cut.toml"
    path.write_text(to_toml(cut))
    killed = subprocess.run(
        [sys.executable, str(DRIVER), "1", "SIGKILL", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(killed.stdout.split()[-1]) == -signal.SIGKILL
    assert json.loads((tmp_path / "cut" / "checkpoint.json").read_text())["step"] == 12
    for folder, expected in zip(train(cut), whole, strict=True):
        for name in ("sae_weights.safetensors", "cfg.json"):
            assert (folder / name).read_bytes() == (expected / name).read_bytes(), folder.name
    metrics = evaluate(EvaluateConfig(store=cut.store, saes=cut.output, output=str(tmp_path / "evaluation")))
    judged = {row["name"]: row["explained_variance"] for row in metrics}
    assert set(judged) == {folder.name for folder in whole}
    # In 150 steps only those whose sparsity is given, not penalised, have become good.
    assert all(judged[name] > 0.7 for name in judged if name.endswith("topk")), judged
    assert all(-0.1 < value < 1 for value in judged.values()), judged
