"""Rows are rotated to the principal axes of their hook points; runs keep those axes, and saved SAEs know none."""

import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import thresher.train.checkpoints.normalizations as normalizations_module
import thresher.train.plan as plan_module
from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.shared.core.errors import ConfigError
from thresher.train import TrainConfig, train
from thresher.train.architectures import ARCHITECTURES, make_config
from thresher.train.checkpoints.record import _checksum
from thresher.train.kernels import kernels_for
from thresher.train.lockstep import prepare_batches
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization, normalization_across, normalization_of, row_scale
from thresher.train.stream.rotation import Rotation, principal_axes

D, CONTEXT, BATCH = 24, 16, 64
TABLES = [
    {"name": "topk", "hook_point": "h", "d_sae": 48, "k": 4},
    {"name": "transcoder", "reads": "also", "writes": "out", "architecture": "topk", "d_sae": 40, "k": 4, "skip": True},
    {"name": "crosscoder", "hook_points": ["h", "also"], "architecture": "batch_topk", "d_sae": 40, "k": 4},
]
AXES = "principal_axes.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Write sparse features in few directions, with a channel of a thousand times the others' deviation."""
    path, g = tmp_path_factory.mktemp("rotation") / "store", torch.Generator().manual_seed(7)
    features = torch.rand(320 * CONTEXT, 40, generator=g) * (torch.rand(320 * CONTEXT, 40, generator=g) < 0.1)
    hooks = {
        name: features @ torch.randn(40, width, generator=g) for name, width in (("h", D), ("also", D), ("out", 9))
    }
    hooks["h"][:, 5] *= 1000
    contexts = {name: rows.view(320, CONTEXT, -1) for name, rows in hooks.items()}
    widths = {name: rows.shape[1] for name, rows in hooks.items()}
    with ActivationStoreWriter(path, widths, CONTEXT, dtype="float32", codec="none") as writer:
        writer.append(contexts, held_out=np.arange(320) % 5 == 0)
    return path


@pytest.fixture
def config(store, tmp_path):
    return TrainConfig(
        store=str(store),
        output=str(tmp_path / "out"),
        sae=TABLES,
        rotation="pca",
        batch_size=BATCH,
        tokens=BATCH * 40,
        checkpoint_every_tokens=BATCH * 10,
    )


def change(config, **keys):
    return msgspec.structs.replace(config, **keys)


def weights(config):
    return [(folder / "sae_weights.safetensors").read_bytes() for folder in train(config)]


def training_rows(store, hook):
    mask = np.asarray(store.training_mask(0, store.n_rows))
    return store.read(hook, 0, store.n_rows).double().numpy()[mask]


@pytest.mark.parametrize("max_row_norm", [10.0, 1.2])
@pytest.mark.parametrize("hook", ["h", "out"])
def test_axes_are_eigenvectors_of_the_covariance_of_normalised_rows(store, hook, max_row_norm):
    """Of all rows, in float64 NumPy: axes are orthonormal and rotated channels uncorrelated, by ascending variance."""
    store = ActivationStore.open(store)
    by = normalization_of(store, hook, row_scale(store, hook, "expected_average_only_in", max_row_norm))
    x = training_rows(store, hook)
    x = (x - x.mean(0)) * by.scale
    x *= np.minimum(by.max_norm / np.linalg.norm(x, axis=1, keepdims=True), 1)
    V = principal_axes(store, hook, by.scale, by.max_norm)
    assert V.dtype == torch.float32
    V = V.double().numpy()
    np.testing.assert_allclose(V.T @ V, np.eye(len(V)), atol=1e-6)
    turned = V.T @ (x.T @ x / len(x)) @ V
    variances = np.diag(turned)
    assert (np.diff(variances) >= 0).all()
    correlations = turned / np.sqrt(np.outer(variances, variances))
    np.testing.assert_allclose(correlations, np.eye(len(V)), atol=2e-3)
    np.testing.assert_allclose(variances, np.linalg.eigvalsh(x.T @ x / len(x)), rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_batch_is_centred_scaled_shortened_and_then_rotated(backend, dtype):
    """Against float64 NumPy; hook points side by side are each rotated by their own axes."""
    torch.manual_seed(0)
    hooks = {"h": 6, "also": 6, "out": 4}
    kinds = {
        name: Normalization(
            torch.randn(d), 0.7, 1.0, max_norm=2.0, rotation=Rotation((torch.linalg.qr(torch.randn(d, d)).Q,))
        )
        for name, d in hooks.items()
    }
    rows = {name: 3 * torch.randn(20, d) for name, d in hooks.items()}
    config = make_config(hook_point="h", architecture="topk", d_sae=16, k=2, reads=("h", "also"), writes="out")
    trainer = SaeTrainer(
        config=config,
        d_in=12,
        normalization=normalization_across(config, kinds),
        schedule=Schedule(10, 20, 1, 0.2),
        kernels=kernels_for("cpu", backend),
        compute_dtype=dtype,
    )
    (batch,) = prepare_batches(rows, [trainer]).values()

    def expected(names):
        parts = [(rows[name].double() - kinds[name].mean.double()) * 0.7 for name in names]
        x = torch.cat(parts, 1).numpy()
        x *= np.minimum(2.0 * len(names) ** 0.5 / np.linalg.norm(x, axis=1, keepdims=True), 1)
        return x @ torch.block_diag(*(kinds[name].rotation.axes[0] for name in names)).double().numpy()

    np.testing.assert_allclose(batch.x, expected(["h", "also"]), atol=1e-5)
    np.testing.assert_allclose(batch.target, expected(["out"]), atol=1e-5)
    assert batch.x_compute.dtype == dtype
    assert torch.equal(batch.x_compute, batch.x.to(dtype))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_starts_at_the_same_function_with_and_without_it(name):
    """Before training, what is saved is the same: initial weights are drawn in the channels' coordinates."""
    given = {"k": 4} if "k" in ARCHITECTURES[name].keys else {"l1_coefficient": 1.0}
    needed = {key: 0.5 for key in ARCHITECTURES[name].required if key not in given}
    needed |= {"l0_coefficient": 0.5} if name == "jumprelu" else {}
    places = {"reads": "h", "writes": "also"} if "transcoder" in name else {}
    places = {"hook_points": ("h", "also")} if name == "crosscoder" else places
    keys = {key: value for key, value in (given | needed | places).items() if key in ARCHITECTURES[name].keys}
    config = make_config(hook_point="h", architecture=name, d_sae=32, **keys)
    torch.manual_seed(1)
    kinds = {h: Normalization(torch.randn(D), 0.5, 1.0) for h in ("h", "also")}
    turned = {h: replace(kind, rotation=Rotation((torch.linalg.qr(torch.randn(D, D)).Q,))) for h, kind in kinds.items()}
    saved = []
    for by in (kinds, turned):
        normalization = normalization_across(config, by)
        trainer = SaeTrainer(
            config=config,
            d_in=len(normalization.mean),
            normalization=normalization,
            schedule=Schedule(10, 20, 1, 0.2),
            kernels=kernels_for("cpu"),
        )
        saved.append(trainer.to_sae({}).state_dict())
    for key, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][key], tensor, rtol=1e-4, atol=1e-5)


def test_saved_saes_explain_in_raw_units_what_training_logged(config, store):
    train(change(config, tokens=BATCH * 400))
    opened = ActivationStore.open(store)
    for name, reads, writes in (
        ("topk", ["h"], ["h"]),
        ("transcoder", ["also"], ["out"]),
        ("crosscoder", ["h", "also"], ["h", "also"]),
    ):
        folder = f"{config.output}/{name}"
        sae, x = Sae.load(folder), np.concatenate([training_rows(opened, hook) for hook in reads], axis=1)
        y = np.concatenate([training_rows(opened, hook) for hook in writes], axis=1)
        y_hat = sae(torch.from_numpy(x).float()).double().numpy()
        n = len(writes)
        error, spread = ((v**2).reshape(len(v), n, -1).sum((0, 2)) for v in (y - y_hat, y - y.mean(0)))
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        logged = np.mean([line["explained_variance"] for line in lines[-5:]])
        explained = 1 - error.sum() / spread.sum() if n == 1 else 1 - (error / spread).mean()
        assert explained == pytest.approx(logged, abs=0.06), name
        assert explained > 0.3, name


def test_a_killed_run_resumes_along_the_axes_in_its_folder(config, tmp_path, train_killed, monkeypatch):
    """Even where this machine would compute others, such as the same with another sign."""
    expected = weights(change(config, output=str(tmp_path / "whole")))
    train_killed(config, 25)
    kept = load_file(tmp_path / "out" / AXES)
    assert set(kept) == {"h", "also", "out"}
    with monkeypatch.context() as patch:
        patch.setattr(normalizations_module, "principal_axes", lambda *given: -principal_axes(*given))
        assert weights(config) == expected
    assert all(torch.equal(V, kept[name]) for name, V in load_file(tmp_path / "out" / AXES).items())
    longer = weights(change(config, tokens=BATCH * 60))
    assert longer == weights(change(config, output=str(tmp_path / "whole"), tokens=BATCH * 60))


@pytest.mark.parametrize("damage", ["missing", "another bit", "cut short"])
def test_damaged_axes_are_computed_again_if_that_gives_the_same_bits(
    config, tmp_path, train_killed, monkeypatch, damage
):
    expected = weights(change(config, output=str(tmp_path / "whole")))
    train_killed(config, 25)
    path = tmp_path / "out" / AXES
    content = path.read_bytes()

    def break_it():
        if damage == "missing":
            path.unlink(missing_ok=True)
        elif damage == "cut short":
            path.write_bytes(content[:-7])
        else:
            kept = load_file(path)
            kept["h"].view(torch.int32)[3, 2] ^= 1
            save_file(kept, path)

    break_it()
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").rglob("*.safetensors")}
    with monkeypatch.context() as patch:
        patch.setattr(normalizations_module, "principal_axes", lambda *given: -principal_axes(*given))
        with pytest.raises(
            ConfigError, match=r"is missing or damaged, and this machine computes other axes of '(also|h)'"
        ):
            train(config)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").rglob("*.safetensors")} == before
    assert weights(config) == expected
    assert path.read_bytes() == content


def test_a_run_of_a_release_that_rotated_nothing_resumes_without(config, tmp_path, train_killed):
    """Its record names no axes, and its configuration has no `rotation`."""
    expected = weights(change(config, output=str(tmp_path / "whole"), rotation="none"))
    train_killed(change(config, rotation="none"), 25)
    assert not (tmp_path / "out" / AXES).exists()
    path = tmp_path / "out/checkpoint.json"
    record = json.loads(path.read_text())
    del record["config"]["rotation"], record["axes"], record["crc32c"]
    path.write_text(json.dumps(record | {"crc32c": _checksum(record)}))
    assert weights(change(config, rotation=None)) == expected
    with pytest.raises(ConfigError, match="differing: rotation"):
        train(config)


def test_a_plan_says_whether_rows_are_rotated(config, capsys):
    for keys, line in (
        ({"rotation": None}, "chosen: rotation = pca (except for transcoders: Adam scales"),
        ({"rotation": None, "recipe": "published"}, "chosen: rotation = none (published)"),
        ({"rotation": "none"}, None),
    ):
        train(change(config, dry_run=True, **keys))
        (*found,) = re.findall("chosen: rotation.*", capsys.readouterr().out)
        assert [text.startswith(str(line)) for text in found] == [True] * (line is not None)


def test_by_default_saes_that_write_what_they_read_are_rotated_and_others_are_not(config, tmp_path):
    """Each as if all were, or as if none was; the axes of the others' hook points are not computed."""
    both = {"name": "both", "reads": ["h", "also"], "writes": "out", "architecture": "topk", "d_sae": 40, "k": 4}
    config = change(config, sae=[*config.sae, both])
    chosen = weights(change(config, rotation=None))
    assert set(load_file(tmp_path / "out" / AXES)) == {"h", "also"}
    rotated = weights(change(config, output=str(tmp_path / "given")))
    plain = weights(change(config, output=str(tmp_path / "none"), rotation="none"))
    assert chosen == [rotated[0], plain[1], rotated[2], plain[3]]
    assert all(one != other for one, other in zip(rotated, plain, strict=True))


def test_a_run_of_a_release_that_rotated_no_crosscoders_is_trained_on_without(config, tmp_path, monkeypatch):
    """Its record does not say what kinds of SAEs it rotates."""
    begun, longer = change(config, rotation=None), {"tokens": BATCH * 60}
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "ROTATED_KINDS", ("sae",))
        weights(begun)
    path = tmp_path / "out/checkpoint.json"
    record = json.loads(path.read_text())
    assert record.pop("rotated_kinds") == ["sae", "crosscoder"]
    del record["crc32c"]
    path.write_text(json.dumps(record | {"crc32c": _checksum(record)}))
    found = weights(change(begun, **longer))
    others = []
    for rotation in ("pca", "none"):
        other = change(config, output=str(tmp_path / rotation), rotation=rotation)
        weights(other)
        others.append(weights(change(other, **longer)))
    rotated, plain = others
    assert found == [rotated[0], *plain[1:]]
