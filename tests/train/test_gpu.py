"""On a GPU: whole runs repeat in every bit, resume, and reach what a CPU reaches."""

import json

import msgspec
import numpy as np
import pytest
import torch

import thresher.train.run as run_module
from thresher.shared import ActivationStoreWriter, Sae
from thresher.train import TrainConfig, train

pytestmark = pytest.mark.gpu

TOPK = {"architecture": "topk", "hook_point": "blocks.0.resid_post", "d_sae": 96, "lr": 3e-3, "k": 4}
SWEEP = [
    TOPK,
    TOPK | {"k": 8, "clip_grad_norm": 1.0},
    TOPK | {"architecture": "batch_topk"},
    TOPK | {"architecture": "matryoshka_batch_topk", "prefix_sizes": [24, 96]},
    TOPK | {"architecture": "hierarchical_topk"},
    TOPK | {"architecture": "jumprelu", "l0_coefficient": 0.02, "k": None},
    TOPK | {"architecture": "gated", "l1_coefficient": 0.3, "k": None},
    TOPK | {"architecture": "standard", "l1_coefficient": 0.3, "k": None},
]


@pytest.fixture
def config(tmp_path, sparse_activations):
    x = sparse_activations[: 372 * 16].view(372, 16, 32)
    with ActivationStoreWriter(tmp_path / "store", {"blocks.0.resid_post": 32}, 16) as writer:
        writer.append({"blocks.0.resid_post": x}, held_out=np.arange(372) % 5 == 0)
    tables = [{key: value for key, value in table.items() if value is not None} for table in SWEEP]
    return TrainConfig(
        store=str(tmp_path / "store"),
        output=str(tmp_path / "saes"),
        batch_size=128,
        tokens=128 * 100,
        warmup_steps=5,
        checkpoint_every_tokens=128 * 30,
        log_every_steps=10,
        window_bytes=1 << 18,
        sae=tables,
    )


def to(config, tmp_path, name, **changes):
    return msgspec.structs.replace(config, output=str(tmp_path / name), **changes)


def weights(folders):
    return {folder.name: (folder / "sae_weights.safetensors").read_bytes() for folder in folders}


def explained(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["explained_variance"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def test_a_sweep_repeats_and_resumes_in_every_bit(config, tmp_path, monkeypatch):
    whole = train(config)
    assert 'device = "cuda"' in (whole[0] / "config.toml").read_text()
    assert weights(train(to(config, tmp_path, "again"))) == weights(whole)
    prepare, calls = run_module.prepare, []

    def dying(*arguments):
        calls.append(None)
        if len(calls) > 70:
            raise Killed
        return prepare(*arguments)

    cut = to(config, tmp_path, "cut")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare", dying)
        with pytest.raises(Killed):
            train(cut)
    assert weights(train(cut)) == weights(whole)


def test_every_path_learns_as_much_as_a_cpu(config, tmp_path):
    kernels = train(config)
    reference = train(to(config, tmp_path, "reference", kernels="reference"))
    cpu = train(to(config, tmp_path, "cpu", device="cpu"))
    for folders in zip(kernels, reference, cpu, strict=True):
        found = [explained(folder) for folder in folders]
        assert found == pytest.approx([found[2]] * 3, abs=0.02), folders[0].name
        assert Sae.load(folders[0]).W_dec.isfinite().all()


def test_a_whole_topk_step_waits_for_the_device_only_to_look_for_the_dead(config):
    config = msgspec.structs.replace(config, sae=[SWEEP[0]], tokens=128 * 5, log_every_steps=100)
    trainers = []
    make = run_module.make_trainers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "make_trainers", lambda *a: trainers.extend(make(*a)) or trainers)
        train(config)
    trainer = trainers[0]
    x = torch.randn(128, 32, device="cuda")
    batch = run_module.Batch(x, x.to(torch.bfloat16))
    trainer.step(batch)
    trainer.whole_step._look_at = 1 << 60
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
