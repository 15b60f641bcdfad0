"""Where and by which operations a run trains is chosen by the configuration, and the plan says so."""

import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import thresher.shared.core.compute.device as device_module
from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.prepare import prepare_evaluation
from thresher.harvest.config import HarvestConfig
from thresher.harvest.model.plan import make_plan
from thresher.shared import ActivationStoreWriter, Sae
from thresher.shared.core.errors import ConfigError, MissingFileError, ModelError
from thresher.train import ShuffledBatches, TrainConfig, train
from thresher.train.stream.gpu_windows import QuantisedRows, used_here


@pytest.fixture
def configured(tmp_path, sparse_activations):
    with ActivationStoreWriter(tmp_path / "store", {"blocks.0.resid_post": 32}, 16) as writer:
        writer.append({"blocks.0.resid_post": sparse_activations[:1600].view(100, 16, 32)})
    table = {"hook_point": "blocks.0.resid_post", "d_sae": 48, "lr": 1e-3}

    def config(name, **changes):
        changes = {"sae": [table | {"k": 4}, table | {"architecture": "gated", "l1_coefficient": 0.3}]} | changes
        return TrainConfig(
            store=str(tmp_path / "store"),
            output=str(tmp_path / name),
            **{"batch_size": 64, "tokens": 640, "warmup_steps": 2} | changes,
        )

    return config


def test_auto_is_what_there_is(monkeypatch):
    for found, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert device_module.choose_device("auto") == expected
    assert device_module.describe_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="no CUDA device; use device = 'cpu'"):
        device_module.choose_device("cuda:1")
    for other in ("gpu", "xpu", "meta", "cpu:1", "cuda:", ""):
        with pytest.raises(ConfigError, match=f"expected device auto, cpu, cuda or cuda:N; got '{other}'"):
            device_module.choose_device(other)


@pytest.fixture
def current(monkeypatch):
    """Pretend that there are GPUs, up to their first tensor; return the numbers of those made the current one."""
    made_current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made_current.append, raising=False)
    return made_current


@pytest.mark.parametrize(
    ("device", "said", "made_current"),
    [("auto", "cuda", []), ("cuda", "cuda", []), ("cuda:0", "cuda:0", [0]), ("cuda:1", "cuda:1", [1])],
)
def test_every_stage_accepts_a_gpu_with_or_without_its_number(
    configured, current, capsys, tmp_path, device, said, made_current
):
    """PyTorch makes no device the current one that has no number."""
    train(configured("planned", device=device, dry_run=True))
    assert f"on {said} (a GPU) with triton kernels" in capsys.readouterr().out
    assert current == made_current
    current.clear()
    store = str(tmp_path / "store")
    with pytest.raises(ModelError, match="contains no tokenizer"):
        make_plan(HarvestConfig(model=str(tmp_path), dataset="text", hook_points=("x",), store=store, device=device))
    with pytest.raises(MissingFileError, match="no SAE in"):
        prepare_evaluation(EvaluateConfig(store=store, saes=str(tmp_path), output=str(tmp_path / "out"), device=device))
    assert current == 2 * made_current


@pytest.mark.parametrize(("device", "number"), [("cuda:1", 1), ("cuda", 2)])
def test_windows_are_decoded_with_the_batches_gpu_current(array_store, monkeypatch, device, number):
    """Pinned memory belongs to the current device, which each thread has of its own."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    set_device = lambda n: chosen.append((n, threading.current_thread().name))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_setDevice", set_device, raising=False)
    store = array_store({"x": torch.randn(64, 8)})
    store.codec = "none"
    with ShuffledBatches(store, device=device, batch_size=8) as batches:
        batches._decoder.submit(lambda: None).result()
    assert [n for n, _ in chosen] == [number]
    assert chosen[0][1].startswith("decode-window")


def test_a_gpu_reads_a_window_on_the_stream_that_trains(monkeypatch):
    """Its memory is the default stream's, and is not reused before what another stream has yet to do with it."""
    on, recorded = SimpleNamespace(name="training"), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: on)
    tensor = SimpleNamespace(is_cuda=True, device="cuda:0", record_stream=recorded.append)
    used_here(QuantisedRows(tensor, tensor, torch.bfloat16))
    assert recorded == [on, on]
    used_here(torch.zeros(3))


@pytest.mark.parametrize("error", [None, RuntimeError("it waited")])
def test_after_a_test_that_refuses_waits_they_are_allowed(monkeypatch, refusing_waits, error):
    """Else one failure would break every later test that needs a GPU."""
    modes = []

    def set_mode(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with nullcontext() if error is None else pytest.raises(RuntimeError, match="it waited"), refusing_waits():
        if error is not None:
            raise error
    assert modes == ["error", "default"]


@pytest.mark.parametrize(("kernels", "said"), [("auto", "cpu"), ("reference", "reference")])
def test_the_plan_says_where_and_how(configured, capsys, kernels, said):
    train(configured("planned", kernels=kernels, device="cpu", dry_run=True))
    assert f"on cpu with {said} kernels" in capsys.readouterr().out


def test_references_train_what_the_cpu_operations_train(configured):
    runs = [
        train(configured(kernels, kernels=kernels, device="cpu", compute_dtype="float32"))
        for kernels in ("auto", "reference")
    ]
    for one, other in zip(*runs, strict=True):
        first, second = Sae.load(one), Sae.load(other)
        torch.testing.assert_close(first.W_dec, second.W_dec, rtol=1e-3, atol=1e-3)
        assert not torch.equal(first.W_dec, torch.zeros_like(first.W_dec))
    assert 'kernels = "reference"' in (runs[1][0] / "config.toml").read_text()
