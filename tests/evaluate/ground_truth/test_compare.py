"""Scores against the truth: on the same rows, in dense float64 NumPy, and by SAELens's own evaluation."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.ground_truth import compare
from thresher.evaluate.ground_truth.match import match_features
from thresher.evaluate.ground_truth.store_truth import read_store_truth
from thresher.evaluate.run import evaluate
from thresher.harvest import HarvestConfig, harvest
from thresher.shared.core.errors import StoreError
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStore
from thresher.shared.synthetic.law import LAWS, SyntheticLaw
from thresher.shared.synthetic.sampler import Sampler
from thresher.shared.synthetic.truth import make_forest, make_truth

LAW = SyntheticLaw(n_features=60, d_in=24, n_roots=3, branching=3, depth=2, max_probability=0.5, min_probability=0.02)
N_ROWS = 5000


def saes(truth):
    """Return an SAE of the first features' own directions, noisy, and two of random directions."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, noise, selection in (("noisy", 0.1, "standard"), ("random", 1e3, "standard"), ("topk", 0.2, "topk")):
        decoder = truth.vectors[:20] + noise * torch.randn(20, 24, generator=generator) / 24**0.5
        decoder = torch.nn.functional.normalize(decoder, dim=1)
        tensors = {"W_enc": decoder.T.clone(), "b_enc": torch.full((20,), -1.0), "W_dec": decoder}
        tensors["b_dec"] = truth.bias.clone()
        config = {"k": 4} if selection == "topk" else {}
        found[name] = Sae(selection, tensors, hook_point="features", config=config, metadata={"model_name": ""})
    found["noisy"].b_enc.data[5] = -1e4  # never fires
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    root = tmp_path_factory.mktemp("truth")
    patch = pytest.MonkeyPatch()
    patch.setitem(LAWS, "tiny", LAW)
    harvest(
        HarvestConfig(
            model="synthetic:tiny",
            hook_points=["features"],
            store=str(root / "store"),
            tokens=4096,
            context_size=64,
            holdout_fraction=0.3,
            chunk_bytes=4096,
        )
    )
    patch.undo()
    folders = [str(sae.save(root / name)) for name, sae in saes(make_truth(LAW)).items()]
    config = EvaluateConfig(
        store=str(root / "store"), saes=folders, output=str(root / "out"), ground_truth_rows=N_ROWS, device="cpu"
    )
    return {row["name"]: row for row in evaluate(config)}, root


def drawn(truth):
    """Return the features' values and the rows that an evaluation draws."""
    sampler = Sampler(truth)
    values, rows = [], []
    for group in range(compare.GROUPS):
        n = N_ROWS // compare.GROUPS
        firing = sampler.fire(n, compare.SEED + group)
        part = torch.zeros(n, LAW.n_features)
        part[firing.row, firing.feature] = firing.magnitude
        values.append(part)
        rows.append(sampler.activations(firing, n))
    return torch.cat(values), torch.cat(rows)


@pytest.mark.parametrize("name", ["noisy", "random", "topk"])
def test_scores_equal_those_counted_in_dense_matrices(evaluated, name):
    metrics, root = evaluated
    truth, sae = make_truth(LAW), saes(make_truth(LAW))[name]
    values, x = drawn(truth)
    latents = sae.encode(x).numpy() > 0
    fires = values.numpy() > 0
    directions, decoder = truth.vectors.double().numpy(), sae.W_dec.double().numpy()
    cosines = (
        np.abs(decoder @ directions.T) / np.linalg.norm(directions, axis=1) / np.linalg.norm(decoder, axis=1)[:, None]
    )
    best = cosines.argmax(1)
    precision, recall, f1, absorbed = [], [], [], []
    forest = make_forest(LAW)
    for latent, feature in enumerate(best):
        fired, true = latents[:, latent], fires[:, feature]
        hit = (fired & true).sum()
        precision.append(hit / fired.sum() if fired.any() else 0.0)
        recall.append(hit / true.sum())
        f1.append(2 * precision[-1] * recall[-1] / (precision[-1] + recall[-1]) if hit else 0.0)
        children = [child for child in range(LAW.n_features) if forest.parent[child] == feature]
        with_child = true & fires[:, children].any(1)
        if with_child.any() and hit:
            missed = 1 - fired[with_child].mean(), 1 - fired[true & ~with_child].mean()
            absorbed.append(missed[0] - missed[1])
    expected = {"precision": np.mean(precision), "recall": np.mean(recall), "f1": np.mean(f1)}
    expected |= {"absorption": np.mean(absorbed), "uniqueness": len(set(best)) / 20, "true_l0": fires.sum(1).mean()}
    x_hat = sae(x).double().numpy()
    expected["shrinkage"] = (np.linalg.norm(x_hat, axis=1) / np.linalg.norm(x.double().numpy(), axis=1)).mean()
    found = metrics[name]
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    low, high = found["confidence_95"]["f1"]
    assert low < found["f1"] < high < low + 0.1
    table = pq.read_table(root / "out" / "ground_truth" / f"{name}.parquet").to_pydict()
    assert table["feature"] == best.tolist()
    assert table["f1"] == pytest.approx(f1)
    assert table["cosine"] == pytest.approx(cosines.max(1), abs=1e-6)


def test_matching_directions_score_high_and_random_ones_low(evaluated):
    metrics, _ = evaluated
    assert metrics["noisy"]["f1"] > 0.5 > 0.35 > metrics["random"]["f1"]
    assert metrics["noisy"]["mcc"] > 0.95 > 0.7 > metrics["random"]["mcc"]
    assert metrics["noisy"]["error"] is None


def test_mcc_is_the_best_of_all_matchings():
    truth = make_truth(LAW)
    decoder = torch.nn.functional.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    few = truth._replace(law=LAW, vectors=truth.vectors[:4])
    zeros = torch.zeros(3)
    sae = Sae("standard", {"W_enc": decoder.T, "b_enc": zeros, "W_dec": decoder, "b_dec": torch.zeros(24)})
    cosines = (decoder @ few.vectors.T).abs()
    best = max(sum(float(cosines[i, f]) for i, f in enumerate(order)) / 3 for order in permutations(range(4), 3))
    padded = truth._replace(vectors=torch.cat([few.vectors, torch.zeros(56, 24)]))
    assert match_features(sae, padded).mcc == pytest.approx(best, abs=1e-6)


def test_a_damaged_or_missing_truth_is_an_error(evaluated):
    _, root = evaluated
    path, store = root / "store" / "truth.safetensors", ActivationStore.open(root / "store")
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(StoreError, match="does not have its digest"):
            read_store_truth(store)
        path.unlink()
        with pytest.raises(StoreError, match="is missing"):
            read_store_truth(store)
    finally:
        path.write_bytes(whole)


@pytest.mark.peers
def test_scores_equal_those_of_saelens(evaluated, run_peers, tmp_path):
    metrics, root = evaluated
    truth = make_truth(LAW)
    values, _ = drawn(truth)
    np.savez(tmp_path / "truth.npz", values=values, vectors=truth.vectors, bias=truth.bias)
    script = Path(__file__).with_name("saelens_synthetic.py")
    run_peers(script, tmp_path / "truth.npz", tmp_path / "out.json", *(root / name for name in metrics))
    theirs = json.loads((tmp_path / "out.json").read_text())
    for name, row in metrics.items():
        found = theirs[str(root / name)]
        keys = {"f1": "f1_score"} | {key: key for key in ("precision", "recall", "mcc", "uniqueness", "shrinkage")}
        assert {key: row[key] for key in keys} == pytest.approx({key: found[keys[key]] for key in keys}, abs=1e-4)
        assert row["true_l0"] == pytest.approx(found["true_l0"], abs=1e-4)
