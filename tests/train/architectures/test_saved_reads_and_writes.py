"""What is read and written, times how latents are chosen: saved, loaded, started from, resumed and evaluated."""

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from thresher.evaluate import EvaluateConfig, evaluate
from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.shared.sae.formats.kinds import SAE_KINDS
from thresher.train import TrainConfig, train
from thresher.train.architectures import make_architecture, make_config
from thresher.train.stream.normalization import Normalization, normalization_across
from thresher.train.stream.rotation import Rotation

A, B, C, D = "blocks.0.mlp_in", "blocks.1.mlp_in", "blocks.0.mlp_out", "blocks.1.mlp_out"
WIDTH = {A: 6, B: 6, C: 5, D: 5}
SCALE = {A: 3.0, B: 1.5, C: 0.2, D: 0.7}
D_SAE, K = 24, 3

WIRINGS = {
    "sae": {"hook_point": A},
    "transcoder": {"reads": A, "writes": C},
    "skip transcoder": {"reads": A, "writes": C, "skip": True},
    "crosscoder": {"hook_points": (A, B)},
    "two to two": {"reads": (A, B), "writes": (C, D)},
    "two to one, skip": {"reads": (A, B), "writes": C, "skip": True},
    "one to two": {"reads": A, "writes": (B, A)},
}
SELECTIONS = {
    "standard": {"l1_coefficient": 0.05},
    "gated": {"l1_coefficient": 0.05},
    "jumprelu": {"l0_coefficient": 0.01, "target_l0": 4},
    "tanh": {"architecture": "jumprelu", "l0_coefficient": 0.01, "sparsity_loss": "tanh"},
    "topk": {"k": K},
    "batch_topk": {"k": K},
    "matryoshka_batch_topk": {"k": K},
    "hierarchical_topk": {"k": K},
}
PAIRS = [(wiring, selection) for wiring in WIRINGS for selection in SELECTIONS]


def table(wiring, selection):
    return {"architecture": selection, "d_sae": D_SAE} | SELECTIONS[selection] | WIRINGS[wiring]


def orthogonal(width, seed):
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed))).Q


def normalization(config, rotates=False):
    torch.manual_seed(3)
    by_hook = {h: Normalization(torch.randn(WIDTH[h]), SCALE[h], 2.0) for h in WIDTH}
    if rotates:
        turns = {h: Rotation((orthogonal(WIDTH[h], seed),)) for seed, h in enumerate(WIDTH)}
        by_hook = {h: replace(by_hook[h], rotation=turns[h]) for h in WIDTH}
    return normalization_across(config, by_hook)


def turn(kind):
    """Return the matrix with which rows of a normalisation are multiplied."""
    return torch.block_diag(*kind.rotation.axes).double() if kind.rotation else torch.eye(len(kind.mean)).double()


def made(wiring, selection, **keys):
    """Return an architecture with random parameters and buffers, as training might leave them."""
    config = make_config(**{"hook_point": A} | table(wiring, selection) | keys)
    names = config.wiring.reads, config.wiring.writes
    architecture = make_architecture(config, *(sum(WIDTH[name] for name in part) for part in names))
    parameters = architecture.initial_parameters(torch.Generator().manual_seed(0))
    for name, tensor in parameters.items():
        tensor += 0.3 * torch.randn(tensor.shape)
        if name == "W_dec" and architecture.unit_norm_decoder:
            tensor /= tensor.norm(dim=1, keepdim=True)
    buffers = {name: torch.tensor(0.4) for name in architecture.initial_buffers()}
    return architecture, parameters, buffers


def reconstruct(architecture, p, buffers, kind, rows):
    """Return what training reconstructs of raw rows, in raw units, in float64, from its definition."""
    p = {name: tensor.double() for name, tensor in p.items()}
    x = (rows.double() - kind.mean) * kind.scale @ turn(kind)
    inputs = x - p["b_dec"] if architecture.config.wiring.kind == "sae" else x
    linear, selection = inputs @ p["W_enc"].T, architecture.config.architecture
    z = linear + p.get("b_enc", 0)
    if selection == "gated":
        acts = (linear * p["r_mag"].exp() + p["b_mag"]).relu() * (linear + p["b_gate"] > 0)
    elif selection == "jumprelu":
        acts = z.relu() * (z > p["log_threshold"].exp())
    elif "batch" in selection:
        acts = z.relu() * (z > buffers["threshold"])
    elif "topk" in selection:
        acts = torch.zeros_like(z).scatter(1, z.topk(K, dim=1).indices, 1.0) * z.relu()
    else:
        acts = z.relu()
    y_hat = acts @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if "W_skip" in p else 0)
    target = kind.target or kind
    return y_hat @ turn(target).T / target.scale + target.mean, acts


@pytest.mark.parametrize(("wiring", "selection"), PAIRS)
def test_saved_loaded_and_started_from(wiring, selection, tmp_path):
    """A saved SAE computes on raw rows what was trained, and training that starts from it computes that as well."""
    architecture, parameters, buffers = made(wiring, selection)
    kind, rows = normalization(architecture.config), torch.randn(50, architecture.d_in)
    expected, acts = reconstruct(architecture, parameters, buffers, kind, rows)
    sae = Sae.load(architecture.to_sae(parameters, buffers, kind, {"model_name": "m"}).save(tmp_path / "sae"))
    torch.testing.assert_close(sae(rows).double(), expected, rtol=1e-4, atol=1e-4)
    assert ((sae.encode(rows) > 0) == (acts > 0)).float().mean() > 0.999
    assert (sae.reads, sae.writes) == (architecture.config.wiring.reads, architecture.config.wiring.writes)
    assert (sae.d_in, sae.d_out) == (architecture.d_in, architecture.d_out)
    assert sae.architecture == architecture.saved_name
    assert sae.apply_b_dec_to_input == (wiring == "sae")

    architecture.check_source(sae)
    assert not [line for line in architecture.differences(sae, kind) if "is not used" not in line]
    started, started_buffers = architecture.imported(sae, kind)
    assert started.keys() == parameters.keys()
    again, acts_again = reconstruct(architecture, started, started_buffers, kind, rows)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    if selection not in ("standard", "tanh"):
        torch.testing.assert_close(acts_again, acts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("wiring", "selection"), PAIRS)
def test_what_is_trained_along_other_axes_is_rotated_back(wiring, selection):
    """A saved SAE computes on raw rows what was trained on rotated ones, and so does training that starts from it."""
    architecture, parameters, buffers = made(wiring, selection)
    kind, rows = normalization(architecture.config, rotates=True), torch.randn(50, architecture.d_in)
    if "W_skip" in parameters:
        parameters["W_skip"] += torch.randn(parameters["W_skip"].shape)
    expected, acts = reconstruct(architecture, parameters, buffers, kind, rows)
    assert not torch.allclose(
        reconstruct(architecture, parameters, buffers, normalization(architecture.config), rows)[0], expected
    )
    sae = architecture.to_sae(architecture.rotated(parameters, kind, back=True), buffers, kind, {})
    torch.testing.assert_close(sae(rows).double(), expected, rtol=1e-4, atol=1e-4)
    assert ((sae.encode(rows) > 0) == (acts > 0)).float().mean() > 0.999
    started, started_buffers = architecture.imported(sae, kind)
    again, _ = reconstruct(architecture, architecture.rotated(started, kind), started_buffers, kind, rows)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_hook_points_are_matched_by_name(selection):
    """A crosscoder that lists its hook points in another order starts from the same function."""
    kind_of = {}
    for reads, writes in (((A, B), (C, D)), ((B, A), (D, C))):
        kind_of[reads] = made("two to two", selection, reads=reads, writes=writes, skip=True)
    first, parameters, buffers = kind_of[A, B]
    second = kind_of[B, A][0]
    rows = torch.randn(20, 12)
    expected, _ = reconstruct(first, parameters, buffers, normalization(first.config), rows)
    parameters["W_skip"] += 1.0
    expected, _ = reconstruct(first, parameters, buffers, normalization(first.config), rows)
    sae = first.to_sae(parameters, buffers, normalization(first.config), {})
    started = second.imported(sae, normalization(second.config))
    swapped, _ = reconstruct(second, *started, normalization(second.config), rows.roll(6, dims=1))
    torch.testing.assert_close(swapped.roll(5, dims=1), expected, rtol=1e-4, atol=1e-4)
    lines = [line for line in second.differences(sae, normalization(second.config)) if "order" in line]
    assert len(lines) == 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Write two inputs that share sparse features, and two outputs that are functions of them."""
    path = tmp_path_factory.mktemp("matrix") / "store"
    g = torch.Generator().manual_seed(5)
    features = torch.rand(120 * 16, 12, generator=g) * (torch.rand(120 * 16, 12, generator=g) < 0.2)
    hooks = {hook: features @ torch.randn(12, width, generator=g) for hook, width in WIDTH.items()}
    with ActivationStoreWriter(path, WIDTH, 16) as writer:
        writer.append({hook: rows.view(120, 16, -1) for hook, rows in hooks.items()}, held_out=np.arange(120) % 5 == 0)
    return path


def config_of(store, output):
    tables = [
        {"name": f"{wiring}-{selection}".replace(" ", "_").replace(",", "")} | table(wiring, selection)
        for wiring, selection in PAIRS
    ]
    tables = [{key: list(v) if isinstance(v, tuple) else v for key, v in one.items()} for one in tables]
    return TrainConfig(
        store=str(store),
        output=str(output),
        batch_size=64,
        tokens=64 * 24,
        warmup_steps=2,
        device="cpu",
        checkpoint_every_tokens=64 * 8,
        sae=[one | {"lr": 3e-3, "dead_after_tokens": 300} for one in tables],
    )


def test_all_pairs_train_resume_and_evaluate(store, tmp_path, train_killed):
    config = config_of(store, tmp_path / "whole")
    folders = train(config)
    cut = msgspec.structs.replace(config, output=str(tmp_path / "cut"))
    train_killed(cut, 13)
    for before, after in zip(folders, train(cut), strict=True):
        weights = [(folder / "sae_weights.safetensors").read_bytes() for folder in (before, after)]
        assert weights[0] == weights[1], before.name
    evaluate(
        EvaluateConfig(
            store=str(store),
            saes=str(tmp_path / "whole"),
            output=str(tmp_path / "found"),
            device="cpu",
            model=False,
        )
    )
    found = {row["name"]: row for row in json.loads((tmp_path / "found" / "metrics.json").read_text())}
    assert found.keys() == {folder.name for folder in folders}
    held_out = np.repeat(np.arange(120) % 5 == 0, 16)
    opened = ActivationStore.open(store)
    rows = {hook: opened.read(hook, 0, 120 * 16).float()[held_out] for hook in WIDTH}
    for folder in folders:
        sae, row = Sae.load(folder), found[folder.name]
        x, y = (torch.cat([rows[hook] for hook in names], 1) for names in (sae.reads, sae.writes))
        error = (y - sae(x)).square().sum(1).mean()
        assert row["mse"] == pytest.approx(float(error), rel=1e-3), folder.name
        assert row["l0"] == pytest.approx(float((sae.encode(x) > 0).sum(1).float().mean()), rel=1e-3), folder.name


def test_kinds_have_saelens_names():
    """SAELens reads these; the others have similar names of ours."""
    assert {
        *("standard", "topk", "jumprelu", "gated", "transcoder", "skip_transcoder"),
        *("jumprelu_transcoder", "jumprelu_skip_transcoder", "abstopk", "matching_pursuit"),
    } < SAE_KINDS.keys()
    of_own_reading = {"abstopk", "matching_pursuit", "lista", "leave_one_out"}  # autoencoders only
    assert len(SAE_KINDS.keys() - of_own_reading) == 4 * 5
    assert of_own_reading < SAE_KINDS.keys()
