"""A few rows with massive activations: they are shortened in training, and neither hide nor replace the others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from thresher.evaluate import evaluate
from thresher.shared import ActivationStore, ActivationStoreWriter, Sae
from thresher.train import TrainConfig, train
from thresher.train.checkpoints.record import _checksum
from thresher.train.kernels import kernels_for
from thresher.train.stream.normalization import Normalization, normalization_across, normalization_of, row_scale
from thresher.train.sweep.grids import expand_sweep

D_IN, CONTEXT, MASSIVE = 32, 50, 150.0
EVERY = 97
"""One row of so many is massive."""
KIND = "expected_average_only_in"
SAES = {
    "topk": {"architecture": "topk", "k": 4, "lr": 8e-3},
    "batch_topk": {"architecture": "batch_topk", "k": 4},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 4.0},
    "skip_transcoder": {"architecture": "skip_transcoder", "l1_coefficient": 0.3, "reads": "h", "writes": "also"},
}


def massive_rows(rows):
    """Return rows of which a few point into one of two directions, far away."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(2, D_IN, generator=generator), dim=1)
    places = torch.arange(5, len(rows), EVERY)
    rows = rows.clone()
    rows[places] += MASSIVE * rows.std() * directions[torch.arange(len(places)) % 2]
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory, sparse_activations):
    path = tmp_path_factory.mktemp("massive") / "store"
    rows = massive_rows(sparse_activations.float())
    contexts = {"h": rows.view(-1, CONTEXT, D_IN), "also": massive_rows(-0.5 * rows).view(-1, CONTEXT, D_IN)}
    with ActivationStoreWriter(path, {"h": D_IN, "also": D_IN}, CONTEXT, dtype="float32", codec="none") as writer:
        writer.append(contexts, held_out=np.arange(len(rows) // CONTEXT) % 6 == 0)
    return path


def training_rows(store: ActivationStore, hook: str) -> np.ndarray:
    mask = np.asarray(store.training_mask(0, store.n_rows))
    return store.read(hook, 0, store.n_rows).double().numpy()[mask]


def trained(store, output, max_row_norm):
    """Return a run in the store's own coordinates: along principal axes, massive rows do less harm."""
    tables = [{"d_sae": 64, "name": name} | keys for name, keys in SAES.items()]
    tables = [table if "reads" in table else table | {"hook_point": "h"} for table in tables]
    keys = {"batch_size": 250, "epochs": 20.0, "max_row_norm": max_row_norm, "rotation": "none"}
    train(store=str(store), output=str(output), sae=tables, **keys)
    return output


@pytest.fixture(scope="module")
def both(store, tmp_path_factory):
    """Return runs that shorten rows, as they do by default, and that shorten none."""
    folder = tmp_path_factory.mktemp("runs")
    return {most: trained(store, folder / f"{most:g}", most) for most in (10.0, 0.0)}


def test_the_scale_is_that_of_shortened_rows(store):
    store = ActivationStore.open(store)
    x = training_rows(store, "h")
    centred = x - x.mean(0)
    norms = np.linalg.norm(centred, axis=1)
    most = 10 * np.median(norms)
    assert 0.005 < (norms > most).mean() < 0.02
    found = row_scale(store, "h", KIND, 10.0)
    assert found.max_norm == pytest.approx(most, rel=1e-6)
    assert found.factor == pytest.approx(D_IN**0.5 / np.minimum(norms, most).mean(), rel=1e-6)
    assert found.variance == pytest.approx((np.minimum(norms, most) ** 2).mean(), rel=1e-6)
    shortened = centred * np.minimum(1, most / norms)[:, None] * found.factor
    normalization = normalization_of(store, "h", found)
    mean, scale, max_norm = normalization.mean, normalization.scale, normalization.max_norm
    rows, _ = kernels_for("cpu").normalise(torch.from_numpy(x), mean, scale, torch.float32, max_norm)
    torch.testing.assert_close(rows.double(), torch.from_numpy(shortened), rtol=1e-5, atol=1e-5)
    assert normalization.total_variance == pytest.approx((shortened**2).sum(1).mean(), rel=1e-5)


def test_none_are_shortened_if_asked_and_other_stores_are_as_before(store, array_store):
    store = ActivationStore.open(store)
    x = training_rows(store, "h")
    norms = np.linalg.norm(x - x.mean(0), axis=1)
    found = row_scale(store, "h", KIND, 0.0)
    assert (found.max_norm, found.variance) == (None, None)
    assert found.factor == pytest.approx(D_IN**0.5 / norms.mean(), rel=1e-6)
    assert row_scale(store, "h", "none", 0.0).factor == 1.0
    assert row_scale(store, "h", "none", 10.0).max_norm == pytest.approx(10 * np.median(norms), rel=1e-6)
    plain = array_store({"h": torch.randn(96, 2, generator=torch.Generator().manual_seed(0))})
    assert row_scale(plain, "h", KIND, 10.0).variance is None


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_shorten_rows_as_the_formula_does(name, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 12, generator=generator) * torch.logspace(-2, 2, 300)[:, None]
    rows[7] = 0
    mean = torch.zeros(12)
    for factor in (0.3, torch.rand(12, generator=generator)):
        x, x_compute = kernels_for("cpu", name).normalise(rows, mean, factor, dtype, 2.0)
        scaled = rows.double() * factor
        norms = scaled.norm(dim=1, keepdim=True)
        expected = torch.where(norms > 2, scaled * (2 / norms), scaled)
        torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(x_compute, x.to(dtype))
        unchanged = (norms < 1.999).squeeze(1)
        whole, _ = kernels_for("cpu", name).normalise(rows, mean, factor, dtype)
        assert torch.equal(x[unchanged], whole[unchanged])
        assert 50 < int(unchanged.sum()) < 250


def test_a_crosscoders_row_is_shortened_as_one_row(store):
    store = ActivationStore.open(store)
    (sae,) = expand_sweep(
        [{"architecture": "crosscoder", "hook_points": ["h", "also"], "d_sae": 8, "l1_coefficient": 1.0}]
    )
    kinds = {hook: normalization_of(store, hook, row_scale(store, hook, KIND, 10.0)) for hook in ("h", "also")}
    found = normalization_across(sae, kinds)
    assert isinstance(found, Normalization)
    assert found.max_norm == pytest.approx(np.hypot(kinds["h"].max_norm, kinds["also"].max_norm))


def explained(folder, store, hook, usual):
    """Return the explained variance of held-out rows that are outliers, or are not, in float64."""
    store = ActivationStore.open(store)
    held_out = np.repeat(store.held_out_contexts(), CONTEXT)
    x, y = (store.read(name, 0, store.n_rows).double().numpy()[held_out] for name in ("h", hook))
    y_hat = Sae.load(folder)(torch.from_numpy(x).float()).double().numpy()
    norms = np.linalg.norm(y - y.mean(0), axis=1)
    rows = (norms > 10 * np.median(norms)) != usual
    y, y_hat = y[rows], y_hat[rows]
    return 1 - ((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()


@pytest.mark.parametrize("name", SAES)
def test_the_usual_rows_are_explained_better(both, store, name):
    hook = SAES[name].get("writes", "h")
    with_them, without = (explained(both[most] / name, store, hook, usual=True) for most in (0.0, 10.0))
    assert without > with_them + 0.01


@pytest.mark.parametrize("name", ["topk", "jumprelu"])
def test_massive_rows_are_still_reconstructed(both, store, name):
    """Thresholds do not grow with a row: a JumpReLU SAE must have met massive rows at full length."""
    assert explained(both[10.0] / name, store, "h", usual=False) > 0.9


def test_the_evaluation_says_what_outliers_hold(both, store, tmp_path, capsys):
    evaluate(store=str(store), saes=str(both[10.0]), output=str(tmp_path), model=False, feature_rows=0)
    (row,) = (row for row in json.loads((tmp_path / "metrics.json").read_text()) if row["name"] == "topk")
    usual = explained(both[10.0] / "topk", store, "h", usual=True)
    assert row["explained_variance_without_outliers"] == pytest.approx(usual, abs=1e-5)
    low, high = row["confidence_95"]["explained_variance_without_outliers"]
    assert low < usual < high
    opened = ActivationStore.open(store)
    x = opened.read("h", 0, opened.n_rows).double().numpy()[np.repeat(opened.held_out_contexts(), CONTEXT)]
    squares = ((x - x.mean(0)) ** 2).sum(1)
    outliers = np.sqrt(squares) > 10 * np.median(np.sqrt(squares))
    assert row["outlier_rows"] == outliers.sum() > 0
    assert row["outlier_variance_share"] == pytest.approx(squares[outliers].sum() / squares.sum(), rel=1e-6)
    printed = capsys.readouterr().out
    assert "usual rows" in printed
    assert f"outliers  {outliers.sum()} of {len(x):,} rows hold" in printed


def test_a_run_says_that_it_shortens_rows(store, tmp_path, capsys):
    table = {"hook_point": "h", "d_sae": 8, "k": 2}
    train(store=str(store), output=str(tmp_path / "out"), sae=[table], batch_size=50, tokens=100)
    assert "a few rows at 'h' have massive activations" in capsys.readouterr().err


def test_a_run_begun_by_a_release_that_shortened_none_resumes_without(store, tmp_path, train_killed):
    """Its record has the factors alone, and its configuration has no `max_row_norm`."""
    table = {"hook_point": "h", "d_sae": 8, "k": 2, "name": "sae"}

    def config(output, **keys):
        return TrainConfig(
            store=str(store), output=str(tmp_path / output), sae=[table], batch_size=50, tokens=2000, **keys
        )

    train(config("whole", max_row_norm=0.0))
    train_killed(config("out", max_row_norm=0.0, checkpoint_every_tokens=500), 25)
    path = tmp_path / "out/checkpoint.json"
    record = json.loads(path.read_text())
    record["scales"] = {"h": record.pop("row_scales")["h"]["factor"]}
    record["config"].pop("max_row_norm")
    record.pop("crc32c")
    record["crc32c"] = _checksum(record)
    path.write_text(json.dumps(record))
    train(config("out", checkpoint_every_tokens=500))
    expected, found = (Sae.load(tmp_path / name / "sae") for name in ("whole", "out"))
    assert all(torch.equal(found.state_dict()[key], value) for key, value in expected.state_dict().items())
