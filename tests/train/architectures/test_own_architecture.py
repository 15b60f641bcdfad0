"""A user's architecture is one file: it registers itself, and everything that Thresher does works with it."""

import importlib.util
import json
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from thresher import ActivationStore, ActivationStoreWriter, EvaluateConfig, Sae, TrainConfig, evaluate, train
from thresher.shared.core.errors import ConfigError, SaeError
from thresher.train.architectures import ARCHITECTURES, make_architecture, make_config, register
from thresher.train.help import help_on_architecture, help_on_saes
from thresher.train.plan import plan_run
from thresher.train.sweep.grids import expand_sweep

FILE = Path(__file__).with_name("toy_architecture.py")
BATCH, N_STEPS = 64, 60
TABLE = {"architecture": "ridge", "hook_point": "h", "d_sae": 48, "l2_coefficient": 0.01, "lr": 3e-3, "name": "ridge"}


@pytest.fixture(autouse=True)
def ridge(monkeypatch):
    """Import the file as a user does; afterwards the architecture is not there for other tests."""
    spec = importlib.util.spec_from_file_location("toy_architecture", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    del ARCHITECTURES["ridge"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    path = tmp_path_factory.mktemp("own") / "store"
    with ActivationStoreWriter(path, {"h": 32}, 16) as writer:
        writer.append({"h": sparse_activations[: 200 * 16].view(200, 16, 32)}, held_out=np.arange(200) % 5 == 0)
    return path


def run_config(store, output, *tables, **changes):
    keys = {"batch_size": BATCH, "tokens": BATCH * N_STEPS, "warmup_steps": 5, "device": "cpu"}
    keys["checkpoint_every_tokens"] = BATCH * 10
    return TrainConfig(store=str(store), output=str(output), sae=list(tables or [TABLE]), **keys | changes)


def test_it_trains_saves_loads_and_is_evaluated(store, tmp_path):
    """Beside another architecture. Held-out explained variance is computed again, from the saved tensors."""
    topk = {"architecture": "topk", "hook_point": "h", "d_sae": 48, "k": 4, "name": "topk"}
    folder, _ = train(run_config(store, tmp_path / "saes", TABLE, topk))
    sae = Sae.load(folder)
    assert (sae.architecture, sae.config["architecture"], sae.config["l2_coefficient"]) == ("standard", "ridge", 0.01)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["l2_loss"] > 0
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]

    evaluate(EvaluateConfig(store=str(store), saes=str(tmp_path / "saes"), output=str(tmp_path / "out"), model=False))
    measured = {row["name"]: row for row in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    opened = ActivationStore.open(store)
    x = opened.read("h", 0, opened.n_rows).double().view(200, 16, 32)[opened.held_out_contexts()].reshape(-1, 32)
    w = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    latents = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    error = (latents @ w["W_dec"] + w["b_dec"] - x).square().sum() / (x - x.mean(0)).square().sum()
    assert measured["ridge"]["explained_variance"] == pytest.approx(1 - float(error), abs=1e-4)
    assert measured["ridge"]["explained_variance"] > 0.5
    assert measured["ridge"]["l0"] == pytest.approx(float((latents > 0).sum(1).double().mean()), rel=1e-3)


def test_a_killed_run_resumes_to_the_same_end_and_is_trained_on(store, tmp_path, train_killed):
    (whole,) = train(run_config(store, tmp_path / "whole"))
    cut = run_config(store, tmp_path / "cut")
    train_killed(cut, 33)
    (resumed,) = train(cut)
    assert (resumed / "sae_weights.safetensors").read_bytes() == (whole / "sae_weights.safetensors").read_bytes()
    before = Sae.load(resumed).W_dec.clone()
    (longer,) = train(msgspec.structs.replace(cut, tokens=2 * BATCH * N_STEPS))
    assert not torch.equal(Sae.load(longer).W_dec, before)
    with pytest.raises(ConfigError, match=r"differing: sae 'ridge'.l2_coefficient"):
        train(run_config(store, tmp_path / "whole", TABLE | {"l2_coefficient": 0.02}))


def test_training_starts_from_a_saved_one(store, tmp_path):
    (first,) = train(run_config(store, tmp_path / "first"))
    table = TABLE | {"init_from": str(first), "lr": 1e-12}
    (second,) = train(run_config(store, tmp_path / "second", table, tokens=BATCH))
    for name, tensor in Sae.load(first).named_parameters():
        torch.testing.assert_close(getattr(Sae.load(second), name), tensor, rtol=1e-4, atol=1e-4)
    with pytest.raises(SaeError, match="that is a 'standard' SAE; expected 'topk'"):
        train(run_config(store, tmp_path / "third", {**topk_of(table), "k": 4}))


def topk_of(table):
    return {key: value for key, value in table.items() if key != "l2_coefficient"} | {"architecture": "topk"}


def test_its_keys_are_checked_and_listed_as_those_of_others(store, tmp_path):
    saes = expand_sweep([{**TABLE, "name": None, "l2_coefficient": [0.1, 0.2]}])
    assert [sae.name for sae in saes] == ["ridge-h-48-l2-0.1", "ridge-h-48-l2-0.2"]
    for changes, said in (
        ({"l2_coeficient": 1.0}, r"sae\[0\]: unknown key 'l2_coeficient'; did you mean 'l2_coefficient'\?"),
        ({"l2_coefficient": None}, r"sae\[0\]: architecture 'ridge' needs 'l2_coefficient'"),
        ({"l2_coefficient": -1.0}, r"sae\[0\]: l2_coefficient: expected a number of at least 0, got -1.0"),
        ({"k": 4}, r"sae\[0\]: 'k' is given, but architecture 'ridge' does not use it \(used by: .*topk, "),
        ({"architecture": "topk", "k": 4}, r"'l2_coefficient' is given, .* 'topk' does not .* \(used by: ridge\)"),
        ({"architecture": "rigde"}, r"sae\[0\]: no architecture 'rigde'; did you mean 'ridge'\?"),
    ):
        with pytest.raises(ConfigError, match=said):
            expand_sweep([TABLE | changes])
    with pytest.raises(ConfigError, match="sparsity_warmup_steps is 61, but the run has 60 steps"):
        train(run_config(store, tmp_path / "out", TABLE | {"sparsity_warmup_steps": 61}))
    plan = plan_run(run_config(store, tmp_path / "out"), ActivationStore.open(store), 2560)
    assert plan.describe().splitlines()[0].split() == [
        *("name", "architecture", "hook_point", "d_sae", "l2_coefficient", "lr", "parameters"),
    ]
    assert "Ridge: ReLU and a penalty on the squares of the latents. Needs l2_coefficient." in help_on_saes()
    assert "Norm of the encoder's rows before training. (default 1.0)" in help_on_architecture("ridge")


def test_a_name_is_registered_by_one_module_only(ridge):
    register(ridge.RidgeConfig)(ridge.Ridge)  # as when a notebook runs the cell again
    assert type(make_architecture(make_config(**TABLE), 32)) is ridge.Ridge

    class OtherConfig(ridge.RidgeConfig, frozen=True, kw_only=True):
        pass

    said = f"two architectures are named 'ridge', in toy_architecture and {__name__}"
    with pytest.raises(ConfigError, match=said):
        register(OtherConfig)(ridge.Ridge)
