"""Where and by which operations a run trains is chosen by the configuration, and the plan says so."""

import pytest
import torch

import thresher.shared.core.compute.device as device_module
from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.prepare import prepare
from thresher.harvest.config import HarvestConfig
from thresher.harvest.plan import make_plan
from thresher.shared import ActivationStoreWriter, Sae
from thresher.shared.core.errors import ConfigError, MissingFileError, ModelError
from thresher.train import TrainConfig, train


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
        prepare(EvaluateConfig(store=store, saes=str(tmp_path), output=str(tmp_path / "out"), device=device))
    assert current == 2 * made_current


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
