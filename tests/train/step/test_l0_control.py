"""A target L0 is reached without a coefficient, and the controller is the written one."""

import math

import msgspec
import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter
from thresher.shared.core.errors import ConfigError
from thresher.shared.sae import Sae
from thresher.train import TrainConfig, train
from thresher.train.architectures import make_architecture, make_config
from thresher.train.architectures.contract import L0Target
from thresher.train.step.l0_control import L0Control

TARGET = 4.0
N_STEPS = 300


@pytest.mark.parametrize("last_gain", [40.0, 90.0])
def test_the_factor_follows_the_logarithm_of_l0(last_gain):
    """Against the same controller in plain Python."""
    control = L0Control(L0Target(8.0, 2.0, last_gain=last_gain), 100, torch.device("cpu"))
    integral, l0s = math.log(2.0), [64.0, 30.0, 200.0, 9.0, 0.0, 8.0]
    for step, l0 in enumerate(l0s, 1):
        control.update(torch.tensor(l0, dtype=torch.float64))
        reference = 8.0 * (64.0 / 8.0) ** (1 - min(step / 25, 1))
        error = min(max(math.log(max(l0, 0.1) / reference), -1), 1)
        integral += (40 + (last_gain - 40) * step / 100) / 100 * error
        assert float(control.factor) == pytest.approx(math.exp(integral + error))
    before = control.state.clone()
    control.update(torch.tensor(1000.0), skip=torch.tensor(1.0))
    assert torch.equal(control.state, before)


def test_a_factor_without_effect_does_not_fall_far_and_returns_soon():
    """With a least factor; one that is larger than the first is not kept."""
    control = L0Control(L0Target(8.0, 1.0, least_factor=0.1), 100, torch.device("cpu"))
    for _ in range(50):
        control.update(torch.tensor(1.0, dtype=torch.float64))
    assert float(control.factor) == pytest.approx(0.1 * math.exp(-1))
    for _ in range(6):
        control.update(torch.tensor(16.0, dtype=torch.float64))
    assert float(control.factor) == pytest.approx(0.1 * math.exp((6 * 0.4 + 1) * math.log(2)))
    low = L0Control(L0Target(8.0, 0.01, least_factor=0.1), 100, torch.device("cpu"))
    low.update(torch.tensor(4.0, dtype=torch.float64))
    assert float(low.factor) == pytest.approx(0.01 / 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    path = tmp_path_factory.mktemp("store") / "store"
    x = sparse_activations[:3200].view(200, 16, 32).float()
    with ActivationStoreWriter(path, {"h": 32, "g": 32}, 16, dtype="float32", codec="none") as writer:
        writer.append({"h": x, "g": x.flip(-1).abs() * 3}, held_out=np.arange(200) % 5 == 0)
    return path


@pytest.fixture
def config(store, tmp_path):
    def sae(architecture, **keys):
        table = {"architecture": architecture, "name": "sae", "hook_point": "h", "d_sae": 96, "target_l0": TARGET}
        return TrainConfig(
            store=str(store),
            output=str(tmp_path / "out"),
            batch_size=128,
            tokens=128 * N_STEPS,
            device="cpu",
            checkpoint_every_tokens=128 * 40,
            sae=[table | keys],
        )

    return sae


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("standard", {}),
        ("standard", {"p_final": 0.5, "p_anneal_steps": N_STEPS}),
        ("gated", {"lr": 8e-3}),
        ("jumprelu", {}),
        ("skip_transcoder", {"hook_point_out": "g"}),
        ("gated", {"reads": "h", "writes": "g"}),
        ("standard", {"reads": ["h", "g"], "writes": ["h", "g"], "cross_layer": True, "d_sae": 48}),
    ],
)
def test_a_target_is_reached_without_a_coefficient(config, store, architecture, keys):
    """L0 over all training rows, within 5%."""
    (folder,) = train(config(architecture, **keys))
    lines = [msgspec.json.decode(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([line["l0"] for line in lines[-20:]]) == pytest.approx(TARGET, rel=0.05)
    assert lines[-1]["penalty_factor"] > 0
    if keys == {"lr": 8e-3}:
        opened = ActivationStore.open(store)
        rows = opened.read("h", 0, opened.n_rows).float()[torch.from_numpy(opened.training_mask(0, opened.n_rows))]
        l0 = (Sae.load(folder).encode(rows) != 0).sum(1).float().mean()
        assert float(l0) == pytest.approx(TARGET, rel=0.05)


@pytest.mark.parametrize("architecture", ["jumprelu", "standard"])
def test_the_controller_resumes_where_it_was(config, tmp_path, train_killed, architecture):
    whole, broken = config(architecture), config(architecture)
    (expected,) = train(msgspec.structs.replace(whole, output=str(tmp_path / "whole")))
    train_killed(broken, 200)
    (folder,) = train(broken)
    assert (folder / "sae_weights.safetensors").read_bytes() == (expected / "sae_weights.safetensors").read_bytes()


def test_a_coefficient_beside_a_target_is_where_the_controller_starts_but_for_jumprelu():
    """JumpReLU's is that of the published penalty on the distance from the target."""
    table = {"hook_point": "h", "d_sae": 32, "target_l0": 4.0}
    standard = make_architecture(make_config(architecture="standard", l1_coefficient=3.0, **table), 16)
    jumprelu = make_architecture(make_config(architecture="jumprelu", l0_coefficient=3.0, **table), 16)
    assert standard.l0_target == (4.0, 3.0, 30.0, 90.0, 0.06)
    assert jumprelu.l0_target is None


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "transcoder"])
def test_neither_coefficient_nor_target_is_refused(architecture):
    places = {"hook_point_out": "g"} if architecture == "transcoder" else {}
    with pytest.raises(ConfigError, match=rf"architecture '{architecture}' needs 'l[01]_coefficient'.* or 'target_l0'"):
        make_config(architecture=architecture, hook_point="h", d_sae=32, **places)
