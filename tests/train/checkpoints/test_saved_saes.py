"""SAEs that are saved on the way: they are those that training had then, and nothing else about the run changes."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from thresher.evaluate.saes.sae_folders import sae_folders
from thresher.shared import ActivationStoreWriter
from thresher.shared.sae import Sae
from thresher.train import TrainConfig, train

BATCH, N_STEPS, MIDDLE = 64, 20, 8
SAES = [
    {"name": "topk", "hook_point": "h", "d_sae": 48, "k": 4},
    {"name": "averaged", "hook_point": "h", "d_sae": 48, "k": 4, "ema_decay": 0.9},
    {"name": "batch", "architecture": "batch_topk", "hook_point": "h", "d_sae": 48, "k": 4},
    {"name": "across", "reads": ["h"], "writes": ["g"], "d_sae": 40, "k": 4},
]


@pytest.fixture(scope="module")
def rows(sparse_activations):
    return sparse_activations[: 150 * 16].view(150, 16, 32).float()


@pytest.fixture(scope="module")
def settings(tmp_path_factory, rows):
    store = tmp_path_factory.mktemp("store") / "store"
    with ActivationStoreWriter(store, {"h": 32, "g": 32}, 16, dtype="float32", codec="none") as writer:
        writer.append({"h": rows, "g": rows.flip(-1) * 2}, held_out=np.arange(len(rows)) % 5 == 0)
    return {
        "store": str(store),
        "batch_size": BATCH,
        "tokens": BATCH * N_STEPS,
        "warmup_steps": 5,
        "window_bytes": 1 << 16,
        "normalize_activations": "expected_average_only_in",
        "device": "cpu",
        "checkpoint_every_tokens": BATCH * MIDDLE,
        "keep_checkpoints": 9,
        "sae": SAES,
    }


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "saes"
    train(TrainConfig(output=str(output), save_every_tokens=BATCH * MIDDLE, **settings))
    return output


def saved(output, name, step):
    return output / name / "checkpoints" / f"step-{step:09d}"


def test_every_sae_is_saved_at_every_step_but_the_last_and_not_taken_for_one_of_the_sweep(run):
    for name in (sae["name"] for sae in SAES):
        folders = sorted(path for path in (run / name / "checkpoints").iterdir() if path.is_dir())
        assert folders == [saved(run, name, step) for step in (MIDDLE, 2 * MIDDLE)]
        then, final = Sae.load(folders[0]), Sae.load(run / name)
        assert (then.architecture, then.hook_point, then.target_hook_point) == (
            final.architecture,
            final.hook_point,
            final.target_hook_point,
        )
        assert (then.metadata["step"], then.metadata["tokens"]) == (MIDDLE, MIDDLE * BATCH)
        assert not torch.equal(then.W_dec, final.W_dec)
    assert sorted(path.name for path in sae_folders(str(run))) == sorted(sae["name"] for sae in SAES)


def axes(run):
    """Return the matrix that rotates the rows of a run."""
    return load_file(run / "principal_axes.safetensors")["h"].double()


def test_it_reconstructs_what_the_state_of_that_step_says_in_principal_axes(run, rows):
    state = load_file(saved(run, "topk", MIDDLE).with_suffix(".safetensors"))
    p = {key.removeprefix("parameters."): tensor.double() for key, tensor in state.items() if "parameters." in key}
    training = rows[np.arange(len(rows)) % 5 != 0].reshape(-1, 32).double()
    mean = training.mean(0)
    scale = 32**0.5 / (training - mean).norm(dim=1).mean()
    x = rows[:3].reshape(-1, 32).double()
    V = axes(run)
    pre_acts = ((x - mean) * scale @ V - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    kept = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(4, dim=1).indices, 1.0) * pre_acts.relu()
    expected = (kept @ p["W_dec"] + p["b_dec"]) @ V.T / scale + mean
    found = Sae.load(saved(run, "topk", MIDDLE))
    torch.testing.assert_close(found(x.float()).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_running_means_of_weights_are_saved_where_there_are_some(run):
    state = load_file(saved(run, "averaged", MIDDLE).with_suffix(".safetensors"))
    found = Sae.load(saved(run, "averaged", MIDDLE))
    expected = state["averages.W_dec"].double() @ axes(run).T
    torch.testing.assert_close(found.W_dec.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(state["averages.W_dec"], state["parameters.W_dec"])


def test_the_run_ends_with_the_same_bytes_without_them(run, settings, tmp_path):
    train(TrainConfig(output=str(tmp_path / "plain"), **settings))
    for name in (sae["name"] for sae in SAES):
        weights = [folder / name / "sae_weights.safetensors" for folder in (run, tmp_path / "plain")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert not saved(tmp_path / "plain", name, MIDDLE).exists()


def test_an_sae_that_is_trained_again_loses_what_was_saved_of_its_first_try(settings, tmp_path):
    bad = SAES[0] | {"name": "bad", "lr": 1e18}
    one = settings | {"output": str(tmp_path / "out"), "save_every_tokens": BATCH}
    train(TrainConfig(**one | {"sae": [SAES[0], bad]}))
    stale = saved(tmp_path / "out", "bad", 1)
    stale.mkdir(parents=True, exist_ok=True)
    train(TrainConfig(**one | {"sae": [SAES[0], bad | {"lr": 1e-3}], "save_every_tokens": BATCH * MIDDLE}))
    assert not stale.exists()
    assert saved(tmp_path / "out", "bad", MIDDLE).is_dir()
    assert saved(tmp_path / "out", "topk", 1).is_dir(), "an SAE that stays as it is keeps its own"
