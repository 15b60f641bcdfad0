"""On a GPU: whole runs repeat in every bit, resume, and reach what a CPU reaches."""

import json

import msgspec
import numpy as np
import pytest
import torch

import thresher.train.reporting.metrics as metrics_module
import thresher.train.run as run_module
import thresher.train.step.host_polls as polls_module
from thresher.shared import ActivationStoreWriter, Sae
from thresher.train import TrainConfig, train
from thresher.train.architectures import make_config
from thresher.train.architectures.contract import Batch
from thresher.train.kernels import triton as fused
from thresher.train.step.fused_step import FusedStep
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.step.step_graphs import capture_on_cuda
from thresher.train.step.step_numbers import read_metrics
from thresher.train.stream.normalization import Normalization

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
# What changes from step to step in these the host must not hand to a captured step.
ANNEALED = [
    TOPK | {"k_anneal_steps": 20, "multi_topk_coefficient": 0.125},
    SWEEP[-1] | {"p_final": 0.5, "p_anneal_steps": 80},
    SWEEP[-3] | {"sparsity_loss": "tanh", "bandwidth": 0.2, "sparsity_warmup_steps": 80},
]


def tables_of(saes):
    return [{key: value for key, value in table.items() if value is not None} for table in saes]


@pytest.fixture
def config(tmp_path, sparse_activations):
    x = sparse_activations[: 372 * 16].view(372, 16, 32)
    with ActivationStoreWriter(tmp_path / "store", {"blocks.0.resid_post": 32}, 16) as writer:
        writer.append({"blocks.0.resid_post": x}, held_out=np.arange(372) % 5 == 0)
    return TrainConfig(
        store=str(tmp_path / "store"),
        output=str(tmp_path / "saes"),
        batch_size=128,
        tokens=128 * 100,
        warmup_steps=5,
        checkpoint_every_tokens=128 * 30,
        log_every_steps=10,
        window_bytes=1 << 18,
        sae=tables_of(SWEEP),
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
    prepare, calls = run_module.prepare_batches, []

    def dying(*arguments):
        calls.append(None)
        if len(calls) > 70:
            raise Killed
        return prepare(*arguments)

    cut = to(config, tmp_path, "cut")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare_batches", dying)
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


def test_steps_replayed_as_graphs_train_the_same_bits(config, tmp_path):
    config = msgspec.structs.replace(config, sae=tables_of(SWEEP + ANNEALED))
    graphs = train(config)
    kernel_by_kernel = train(to(config, tmp_path, "eager", cuda_graphs=False))
    assert weights(graphs) == weights(kernel_by_kernel)


def test_lines_of_metrics_are_those_of_a_run_that_reads_each(config, tmp_path, monkeypatch):
    every = to(config, tmp_path, "every", sae=[TOPK], tokens=128 * 40, log_every_steps=1)
    (first,) = train(every)
    monkeypatch.setattr(metrics_module, "_STEPS_UNREAD", 1)
    (second,) = train(to(every, tmp_path, "at once"))
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (first, second)]
    assert [line["step"] for line in lines[0]] == list(range(1, 41))
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


@pytest.mark.parametrize("table", tables_of(SWEEP + ANNEALED), ids=lambda table: table["architecture"])
@pytest.mark.parametrize("capture", [None, capture_on_cuda])
def test_a_step_waits_for_the_device_only_to_look(table, capture, refusing_waits):
    config = make_config(**table, dead_after_tokens=128)
    normalization = Normalization(torch.zeros(32), 1.0, 32.0)
    schedule = Schedule(1000, 128, 1, 0.5)
    trainer = SaeTrainer(
        config=config,
        d_in=32,
        normalization=normalization,
        schedule=schedule,
        kernels=fused.Triton(),
        device="cuda",
        capture=capture,
    )
    x = torch.randn(128, 32, device="cuda")
    batch = Batch(x, x.to(torch.bfloat16))
    steps = 0
    # A ReLU SAE this young fires everywhere, which is dense; that entries are few is for the test to say.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polls_module, "SPARSE_BELOW", 1.1)
        while steps < 40:
            trainer.step(batch)
            steps += 1
        mode = trainer.mode
        polls = [mode.dead] if isinstance(mode, FusedStep) else [mode.parts.polls.dead, mode.parts.polls.room]
        for poll in polls:
            if poll is not None:
                poll.next_poll = 1 << 60
        for _ in range(5):
            trainer.step(batch)
        torch.cuda.synchronize()
        with refusing_waits():
            metrics = trainer.step(batch)
    trainer.check()
    assert trainer.diverged is None
    assert read_metrics(metrics)["loss"] > 0


def test_an_int8_store_trains_on_a_gpu_what_it_does_on_a_cpu(config, tmp_path, sparse_activations):
    x = sparse_activations[: 372 * 16].view(372, 16, 32)
    with ActivationStoreWriter(tmp_path / "int8", {"blocks.0.resid_post": 32}, 16, codec="int8") as writer:
        writer.append({"blocks.0.resid_post": x})
    config = msgspec.structs.replace(config, store=str(tmp_path / "int8"), sae=[TOPK])
    gpu, cpu = train(config), train(to(config, tmp_path, "cpu", device="cpu"))
    assert explained(gpu[0]) == pytest.approx(explained(cpu[0]), abs=0.02)


def test_on_another_stream_than_the_default_batches_are_the_same_and_so_are_weights(config, tmp_path):
    """Windows are made on the default stream, and read on the one that trains."""
    config = msgspec.structs.replace(config, sae=[TOPK])
    usual = train(config)
    with torch.cuda.stream(torch.cuda.Stream()):
        beside = train(to(config, tmp_path, "beside"))
    assert weights(beside) == weights(usual)
