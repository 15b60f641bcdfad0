"""Transcoders and crosscoders: their gradients, and their way through training, saving and loading."""

import json

import msgspec
import numpy as np
import pytest
import torch

from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.shared.core.errors import ConfigError, HookPointError
from thresher.train import TrainConfig, train
from thresher.train.architectures import make_architecture, make_config
from thresher.train.architectures.contract import Batch, StepInput
from thresher.train.kernels import kernels_for
from thresher.train.stream.normalization import Normalization, normalization_across

IN, OUT, OTHER = "blocks.0.mlp_in", "blocks.0.mlp_out", "blocks.1.mlp_in"
CROSS = {"architecture": "crosscoder", "hook_points": (IN, OTHER)}


def problem(d_in, d_out, bias, **keys):
    torch.manual_seed(0)
    config = make_config(hook_point=IN, d_sae=19, l1_coefficient=0.7, **keys)
    architecture = make_architecture(config, d_in, d_out)
    parameters = {
        name: tensor.double() + 0.3 * torch.randn(tensor.shape, dtype=torch.float64) + bias * (name == "b_enc")
        for name, tensor in architecture.initial_parameters(torch.Generator().manual_seed(0)).items()
    }
    return architecture, parameters, torch.randn(40, d_in, dtype=torch.float64)


def check(architecture, parameters, batch, loss_of):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    loss = loss_of(leaves)
    expected = torch.autograd.grad(loss, list(leaves.values()))
    output = architecture.step(parameters, batch, StepInput(kernels_for("cpu"), parameters["W_enc"], 3.7))
    assert float(output.loss) == pytest.approx(loss.item(), rel=1e-10)
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(output.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("bias", [0.0, -3.0])
@pytest.mark.parametrize(("kind", "d_out"), [("transcoder", 5), ("skip_transcoder", 5), ("skip_transcoder", 8)])
def test_transcoder_gradients(kind, d_out, bias):
    """Dense, and sparse with few latents active; input and target differ in width."""
    architecture, parameters, x = problem(8, d_out, bias, architecture=kind, hook_point_out=OUT)
    y = torch.randn(40, d_out, dtype=torch.float64)

    def loss_of(p):
        acts = (x @ p["W_enc"].T + p["b_enc"]).relu()
        y_hat = acts @ p["W_dec"] + p["b_dec"]
        if kind == "skip_transcoder":
            y_hat = y_hat + x @ p["W_skip"].T
        return ((y - y_hat).square().sum(1) + 0.7 * (acts * p["W_dec"].norm(dim=1)).sum(1)).mean()

    check(architecture, parameters, Batch(x, x, y), loss_of)


@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_crosscoder_gradients(bias):
    """The penalty is by the sum of a latent's decoder norms, not by the norm of them all."""
    architecture, parameters, x = problem(8, 8, bias, **CROSS)

    def loss_of(p):
        acts = (x[:, :4] @ p["W_enc"][:, :4].T + x[:, 4:] @ p["W_enc"][:, 4:].T + p["b_enc"]).relu()
        loss = 0
        for part in (slice(0, 4), slice(4, 8)):
            loss = loss + (x[:, part] - acts @ p["W_dec"][:, part] - p["b_dec"][part]).square().sum(1)
            loss = loss + 0.7 * (acts * p["W_dec"][:, part].norm(dim=1)).sum(1)
        return loss.mean()

    check(architecture, parameters, Batch(x, x), loss_of)


@pytest.mark.parametrize("keys", [{"architecture": "skip_transcoder", "hook_point_out": OUT}, CROSS])
def test_what_is_saved_computes_on_raw_rows_what_was_trained(keys, tmp_path):
    by_hook = {name: Normalization(torch.randn(6), scale, 2.0) for name, scale in ((IN, 3.0), (OUT, 0.2), (OTHER, 1.7))}
    config = make_config(hook_point=IN, d_sae=19, l1_coefficient=0.7, **keys)
    kind = normalization_across(config, by_hook)
    d_in = len(kind.mean)
    architecture, p, _ = problem(d_in, 6 if kind.target else d_in, 0.0, **keys)
    p = {name: tensor.float() for name, tensor in p.items()}
    rows = torch.randn(30, d_in)
    x = (rows - kind.mean) * kind.scale
    y_hat = (x @ p["W_enc"].T + p["b_enc"]).relu() @ p["W_dec"] + p["b_dec"]
    if "W_skip" in p:
        y_hat = y_hat + x @ p["W_skip"].T
    target = kind.target or kind
    sae = Sae.load(architecture.to_sae(p, {}, kind, {"model_name": "m"}).save(tmp_path / "sae"))
    torch.testing.assert_close(sae(rows), y_hat / target.scale + target.mean, rtol=1e-4, atol=1e-4)
    saved = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    norms = architecture.decoder_norms(sae.W_dec).sums
    torch.testing.assert_close(norms, torch.ones(19))
    if kind.target:
        assert saved["metadata"]["hook_name_out"] == "blocks.0.hook_mlp_out"
        assert (saved["d_in"], saved["d_out"], saved["apply_b_dec_to_input"]) == (6, 6, False)
    else:
        assert saved["hook_points"] == [IN, OTHER]


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    """Write an input, an output of another width that is a function of it, and a rotated copy of the input."""
    path = tmp_path_factory.mktemp("across") / "store"
    x = sparse_activations[: 372 * 16].float()
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(32, 20, generator=generator)
    hooks = {IN: x, OUT: 0.1 * (x @ directions).relu() + 2, OTHER: x @ torch.linalg.qr(torch.randn(32, 32)).Q * 5}
    rows = {name: part.view(372, 16, -1) for name, part in hooks.items()}
    with ActivationStoreWriter(path, {name: part.shape[1] for name, part in hooks.items()}, 16) as writer:
        writer.append(rows, held_out=np.arange(372) % 5 == 0)
    return path


def run_config(store, tmp_path, *tables):
    keys = {"d_sae": 96, "lr": 3e-3}
    return TrainConfig(
        store=str(store),
        output=str(tmp_path / "saes"),
        batch_size=128,
        tokens=128 * 150,
        warmup_steps=5,
        device="cpu",
        sae=[keys | ({} if "k" in table else {"l1_coefficient": 0.1}) | table for table in tables],
    )


def test_a_sweep_across_places(store, tmp_path):
    """Each explains most of its target's variance, and the sweep's logged share is that of the raw rows."""
    folders = train(
        run_config(
            store,
            tmp_path,
            {"architecture": ["transcoder", "skip_transcoder"], "hook_point": IN, "hook_point_out": OUT},
            {"architecture": "crosscoder", "hook_points": [IN, OTHER]},
            {"architecture": "standard", "hook_point": IN},
        )
    )
    rows = {hook: ActivationStore.open(store).read(hook, 0, 4000).float() for hook in (IN, OUT, OTHER)}
    both = torch.cat([rows[IN], rows[OTHER]], 1)
    pairs = [(rows[IN], rows[OUT]), (rows[IN], rows[OUT]), (both, both), (rows[IN], rows[IN])]
    for folder, (x, y) in zip(folders, pairs, strict=True):
        sae = Sae.load(folder)
        explained = 1 - (y - sae(x)).square().sum() / (y - y.mean(0)).square().sum()
        logged = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["explained_variance"]
        assert explained > 0.6, folder.name
        if sae.architecture != "crosscoder":
            assert float(explained) == pytest.approx(logged, abs=0.05), folder.name


def test_older_names_train_the_same_weights(store, tmp_path):
    """`transcoder`, `skip_transcoder` and `crosscoder` are `standard` that reads and writes the same."""
    tables = [
        ({"architecture": "transcoder", "hook_point": IN, "hook_point_out": OUT}, {"reads": IN, "writes": OUT}),
        (
            {"architecture": "skip_transcoder", "hook_point": IN, "hook_point_out": OUT},
            {"reads": IN, "writes": OUT, "skip": True},
        ),
        ({"architecture": "crosscoder", "hook_points": [IN, OTHER]}, {"hook_points": [IN, OTHER]}),
    ]
    both = [[old, {"architecture": "standard", "name": old["architecture"]} | new] for old, new in tables]
    config = run_config(store, tmp_path, *(table for pair in both for table in pair))
    folders = train(msgspec.structs.replace(config, tokens=128 * 10))
    weights = [(folder / "sae_weights.safetensors").read_bytes() for folder in folders]
    assert weights[::2] == weights[1::2]
    assert len(set(weights)) == 3
    assert [Sae.load(f).architecture for f in folders[1::2]] == ["transcoder", "skip_transcoder", "crosscoder"]


def test_every_recipe_resumes_to_the_same_end(store, tmp_path, train_killed):
    """Averages, powers and resampling are part of the checkpoint, as is what reads several hook points."""
    tables = [
        {"architecture": "skip_transcoder", "hook_point": IN, "hook_point_out": OUT, "ema_decay": 0.9},
        {"architecture": "crosscoder", "hook_points": [IN, OTHER], "resample_every_tokens": 128 * 8},
        {"architecture": "standard", "hook_point": IN, "p_final": 0.3, "p_anneal_steps": 30},
        {"architecture": "topk", "hook_point": IN, "k": 4, "k_anneal_steps": 25, "multi_topk_coefficient": 0.1},
    ]
    config = msgspec.structs.replace(run_config(store, tmp_path, *tables), tokens=128 * 40)
    config = msgspec.structs.replace(config, checkpoint_every_tokens=128 * 10)
    whole = train(config)
    cut = msgspec.structs.replace(config, output=str(tmp_path / "cut"))
    train_killed(cut, 17)
    for before, after in zip(whole, train(cut), strict=True):
        weights = [(folder / "sae_weights.safetensors").read_bytes() for folder in (before, after)]
        assert weights[0] == weights[1], before.name


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"architecture": "transcoder", "hook_point": IN}, ConfigError, "give it reads and writes"),
        ({"architecture": "transcoder", "hook_point": IN, "hook_point_out": "x"}, HookPointError, "no hook point 'x'"),
        ({"architecture": "standard", "hook_point": IN, "hook_point_out": OUT}, ConfigError, "does not use it"),
        ({"architecture": "crosscoder", "hook_points": [IN]}, ConfigError, "at least two"),
        (
            {"architecture": "crosscoder", "hook_points": [IN, OUT]},
            ConfigError,
            "differ in width.*mlp_in' 32, .*mlp_out' 20",
        ),
    ],
)
def test_errors(store, tmp_path, table, error, message):
    with pytest.raises(error, match=message):
        train(run_config(store, tmp_path, table))
