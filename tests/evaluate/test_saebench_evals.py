"""SAEBench's evaluations that need no network, run on our adapter in the peers' environment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]

# ours -> SAEBench's
SAME = {
    "cossim": "cossim",
    "l2_ratio": "l2_ratio",
    "l0": "l0",
    "l1": "l1",
    "ce_clean_saelens": "ce_loss_without_sae",
    "ce_sae_saelens": "ce_loss_with_sae",
    "ce_zero_saelens": "ce_loss_with_ablation",
    "ce_loss_score_saelens": "ce_loss_score",
    "kl_sae": "kl_div_with_sae",
    "kl_zero": "kl_div_with_ablation",
    "kl_div_score": "kl_div_score",
}


@pytest.fixture(scope="module")
def both(tiny, make_sae, run_peers):
    """Our metrics of an SAE, and what SAEBench says of it and of one for the bundled model."""
    root = tiny.root / "saebench"
    root.mkdir()
    sae = make_sae(seed=5, d_sae=64, k=12)
    sae.W_enc.data *= 0.6
    sae.b_dec.data = torch.from_numpy(tiny.activations["blocks.1.resid_post"].numpy().mean((0, 1)))
    folders = [sae.save(root / "sae"), make_sae(seed=1, d_in=256, d_sae=512, k=32).save(root / "text_sae")]
    np.save(root / "tokens.npy", tiny.tokens[tiny.held_out].astype(np.int64))
    run_peers(
        Path(__file__).with_name("saebench_evals.py"),
        *(tiny.root / "model", root / "tokens.npy", 0, ROOT / "models" / "stdlib-lm", root / "out.json", *folders),
        PYTHONPATH=str(Path(__file__).parent),
        JAXTYPING_DISABLE="1",  # SAEBench names two sizes of its sparse probing alike
    )
    settings = {"store": str(tiny.store), "output": str(root / "out"), "feature_rows": 0, "bootstrap_samples": 0}
    return evaluate(EvaluateConfig(saes=[str(folders[0])], **settings))[0], json.loads((root / "out.json").read_text())


def test_the_interface_check(both):
    assert both[1]["check"] == [True]


def test_core_gives_our_figures(both):
    ours, theirs = both[0], both[1]["core"]
    for mine, its in SAME.items():
        assert ours[mine] == pytest.approx(theirs[its], rel=1e-4, abs=1e-6), mine


def test_what_is_known_to_be_wrong_in_saebench(tiny, both):
    """Its `mse` divides by the rows twice; its variance takes the mean of squares for the square of the mean."""
    ours, theirs = both[0], both[1]["core"]
    assert theirs["mse"] == pytest.approx(ours["mse"] / ours["n_rows"], rel=1e-4)
    x = tiny.activations["blocks.1.resid_post"].numpy()[tiny.usable].astype(np.float64)
    variance = np.square(x).sum(axis=1).mean() - np.square(x).mean() ** 2
    assert theirs["explained_variance"] == pytest.approx(1 - ours["mse"] / variance, rel=1e-3)
    assert abs(theirs["explained_variance"] - ours["explained_variance"]) > 0.05


def test_sparse_probing_on_local_text(both):
    """Which package a piece of text is from: one in three by chance."""
    found = both[1]["sparse_probing"]
    assert found["llm_test_accuracy"] > 0.85
    assert 0.85 < found["sae_test_accuracy"] <= 1
    assert 0.55 < found["sae_top_1_test_accuracy"] <= found["sae_top_5_test_accuracy"] + 0.05 <= 1.05


def test_meta_structure(both):
    assert -1 < both[1]["meta_structure"] < 1
