"""Baselines that need no training, and every metric beside them: expected values by NumPy, in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from thresher.evaluate.baselines.directions import moments, principal_components, signed_topk
from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.report.comparison import compare_with_baselines
from thresher.evaluate.run import evaluate
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStore, ActivationStoreWriter

HOOK = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def evaluated(tiny, make_sae):
    """Two trained SAEs of a hook point and one with a frozen decoder, beside both kinds of made baselines."""
    folder = tiny.root / "beside"
    make_sae(k=2, seed=1).save(folder / "topk_k2")
    make_sae(k=10, seed=1, architecture="topk").save(folder / "topk_k10")
    make_sae(k=3, seed=2, freeze=["W_dec"]).save(folder / "frozen")
    output = tiny.root / "beside_evaluation"
    keys = {"bootstrap_samples": 50, "feature_rows": 100, "baselines": ["pca", "neurons"], "model_rows": 48}
    config = EvaluateConfig(store=str(tiny.store), saes=str(folder), output=str(output), **keys)
    return {row["name"]: row for row in evaluate(config)}, output


def test_moments_are_those_of_the_training_rows(tiny):
    mean, covariance = moments(ActivationStore.open(tiny.store), HOOK, 30)
    trained = (tiny.tokens != 0) & ~tiny.held_out[:, None]
    x = tiny.activations[HOOK].numpy()[trained].astype(np.float64)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.T, bias=True), rtol=1e-8, atol=1e-10)
    components = principal_components(covariance).numpy()
    variances = ((x - x.mean(0)) @ components.T).var(0)
    assert (np.diff(variances) < 1e-9).all()
    assert variances.sum() == pytest.approx(x.var(0).sum())


def test_a_baseline_is_the_best_reconstruction_from_k_directions(tiny, evaluated):
    """Of an orthonormal basis, whatever their signs: the k largest projections of each row."""
    metrics, _ = evaluated
    x = tiny.activations[HOOK].numpy()[tiny.usable].astype(np.float64)
    trained = tiny.activations[HOOK].numpy()[(tiny.tokens != 0) & ~tiny.held_out[:, None]].astype(np.float64)
    bases = {"neurons": np.eye(16), "pca": np.linalg.eigh(np.cov(trained.T))[1].T}
    for kind, basis in bases.items():
        for k in (2, 3, 10):
            codes = (x - trained.mean(0)) @ basis.T
            kept = np.argsort(-np.abs(codes), axis=1)[:, :k]
            x_hat = np.take_along_axis(codes, kept, 1)[:, :, None] * basis[kept]
            mse = ((x - trained.mean(0) - x_hat.sum(1)) ** 2).sum(1).mean()
            row = metrics[f"baseline-{kind}-{HOOK}-k{k}"]
            assert (row["baseline"], row["architecture"], row["k"], row["l0"]) == (kind, kind, k, k)
            assert row["explained_variance"] == pytest.approx(1 - mse / x.var(0).sum(), rel=1e-5)
            assert row["ce_loss_score"] is not None


def test_which_saes_are_baselines(evaluated):
    metrics, output = evaluated
    assert metrics["frozen"]["baseline"] == "frozen W_dec"
    assert metrics["topk_k2"]["baseline"] is None
    assert not list(output.glob("features/*baseline*"))  # nobody reads the contexts of made baselines


def test_every_metric_is_beside_the_baseline_of_nearest_l0(evaluated):
    metrics, output = evaluated
    (part,) = json.loads((output / "comparison.json").read_text()).values()
    assert [sae["name"] for sae in part["saes"]] == ["topk_k2", "topk_k10"]
    for sae, k in zip(part["saes"], (2, 10), strict=True):
        for key in ("explained_variance", "mse", "ce_loss_score", "kl_sae"):
            found = sae["metrics"][key]
            names = {"pca": f"baseline-pca-{HOOK}-k{k}", "neurons": f"baseline-neurons-{HOOK}-k{k}"}
            names["frozen W_dec"] = "frozen"
            expected = {kind: {"name": name, "value": metrics[name][key]} for kind, name in names.items()}
            assert found["baselines"] == expected
            values = [value["value"] for value in expected.values()]
            best = min(values) if key in ("mse", "kl_sae") else max(values)
            assert expected[found["best_baseline"]]["value"] == best
            assert found["ahead"] == pytest.approx((best - found["value"]) * (1 if best == min(values) else -1))
            smallest = part["resolution"][key]["smallest_difference"]
            assert found["told_apart"] is (abs(found["value"] - best) > smallest)
    text = (output / "report.html").read_text()
    assert "Beside baselines at blocks.1.resid_post" in text
    assert "smallest difference" in text


def rows_of(values, **changes):
    """Return rows of metrics.json and settings of SAEs that differ in their seeds."""
    rows, settings = [], {}
    for seed, value in enumerate(values):
        name = f"sae-{changes.get('k', 4)}-{seed}"
        row = {"name": name, "architecture": "topk", "hook_point": "h", "l0": 4.0, "explained_variance": value}
        rows.append(row | {"f1": value / 2, "baseline": None, "confidence_95": {"explained_variance": [0.1, 0.14]}})
        settings[name] = {"architecture": "topk", "k": 4, "seed": seed} | changes
    return rows, settings


def test_the_smallest_difference_is_that_of_rows_or_of_seeds():
    first, of_first = rows_of([0.5, 0.6, 0.7])
    second, of_second = rows_of([0.8, 0.82], k=8)
    found = compare_with_baselines(first + second, of_first | of_second)["h"]["resolution"]
    pooled = (np.var([0.5, 0.6, 0.7]) * 3 + np.var([0.8, 0.82]) * 2) / 3
    expected = student.ppf(0.975, 3) * np.sqrt(2 * pooled)
    assert found["explained_variance"]["seeds"] == pytest.approx(expected)
    assert found["explained_variance"]["rows"] == pytest.approx(0.02 * np.sqrt(2))
    assert found["explained_variance"]["smallest_difference"] == pytest.approx(expected)
    assert found["f1"] == pytest.approx(
        {"smallest_difference": expected / 2, "rows": None, "seeds": expected / 2, "degrees_of_freedom": 3}
    )


def test_different_settings_are_no_repetitions():
    rows, settings = rows_of([0.5, 0.6])
    settings["sae-4-1"]["lr"] = 0.1
    found = compare_with_baselines(rows, settings)["h"]["resolution"]
    assert found["explained_variance"]["seeds"] is None
    assert "f1" not in found


def test_a_baseline_reads_rows_whose_mean_is_far_from_zero():
    basis = torch.eye(3, dtype=torch.float64)
    sae = signed_topk(basis, torch.tensor([1000.0, 0.0, 0.0], dtype=torch.float64), 1, "h", "neurons")
    x = torch.tensor([[1000.5, -2.0, 1.0]])
    assert isinstance(sae, Sae)
    assert sae(x).tolist() == [[1000.0, -2.0, 0.0]]


def test_refined_saes_are_evaluated_saved_and_explained_where_they_cannot_be(tiny, make_sae):
    """A ReLU SAE refines; a TopK SAE has no thresholds, which a note says."""
    folder, output = tiny.root / "to_refine", tiny.root / "refined_evaluation"
    make_sae("standard", seed=5).save(folder / "relu")
    make_sae(k=3, seed=5).save(folder / "topk")
    keys = {"bootstrap_samples": 0, "feature_rows": 0, "model": False, "refine": "leave_one_out"}
    rows = evaluate(EvaluateConfig(store=str(tiny.store), saes=str(folder), output=str(output), **keys))
    metrics = {row["name"]: row for row in rows}
    assert list(metrics) == ["relu", "topk", "relu+leave_one_out"]
    assert "not refined" in metrics["topk"]["notes"][0]
    sae = Sae.load(output / "refined" / "relu")
    x = tiny.activations[HOOK][torch.from_numpy(tiny.usable)]
    row = metrics["relu+leave_one_out"]
    assert row["l0"] == pytest.approx(float((sae.encode(x) > 0).sum(1).double().mean()))
    assert row["l0"] < metrics["relu"]["l0"]
    trained = tiny.activations[HOOK][torch.from_numpy((tiny.tokens != 0) & ~tiny.held_out[:, None])]
    assert torch.equal(sae.first_threshold, torch.zeros(32))
    first = Sae.load(folder / "relu").encode(trained)
    scores = torch.where(first > 0, first + (trained - first @ sae.W_dec - sae.b_dec) @ sae.W_dec.T, 0).double()
    for latent in range(32):
        above = scores[:, latent][scores[:, latent] > sae.threshold[latent]]
        assert float(sae.threshold[latent]) == pytest.approx(float(above.mean()) / 2 if len(above) else 0, rel=0.2)


def test_an_int8_store_is_evaluated(tiny, make_sae):
    """Threads of the reader fill what the evaluation allocates in inference mode."""
    root = tiny.root / "int8"
    size, contexts = tiny.tokens.shape[1], len(tiny.tokens)
    with ActivationStoreWriter(root / "store", {HOOK: 16}, size, codec="int8") as writer:
        writer.append({HOOK: tiny.activations[HOOK]}, held_out=np.arange(contexts) % 2 == 0)
    make_sae(k=4).save(root / "saes" / "sae")
    config = EvaluateConfig(store=str(root / "store"), saes=str(root / "saes"), output=str(root / "out"), model=False)
    (row,) = evaluate(config)
    x = ActivationStore.open(root / "store").read(HOOK, 0, contexts * size).view(contexts, size, 16)[::2]
    x = x.reshape(-1, 16).double()
    error = (Sae.load(root / "saes" / "sae")(x.float()).double() - x).square().sum(1).mean()
    assert row["mse"] == pytest.approx(float(error), rel=1e-5)
