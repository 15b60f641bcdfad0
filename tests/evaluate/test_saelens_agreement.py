"""The same figures as sae-lens 6.54's `evals.py`, on the same SAEs, tokens and mask.

SAELens runs in an environment of its own, on TransformerLens's model with the same weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate

pytestmark = pytest.mark.peers

# ours -> SAELens's
SAME = {
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cossim": "cossim",
    "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "relative_reconstruction_bias",
    "l0": "l0",
    "l1": "l1",
    "ce_loss_score_saelens": "ce_loss_score",
    "ce_clean_saelens": "ce_loss_without_sae",
    "ce_sae_saelens": "ce_loss_with_sae",
    "ce_zero_saelens": "ce_loss_with_ablation",
    "kl_div_score": "kl_div_score",
    "kl_sae": "kl_div_with_sae",
    "kl_zero": "kl_div_with_ablation",
}


@pytest.fixture(scope="module")
def both(tiny, make_sae, run_peers):
    """Ours and SAELens's results for SAEs that reconstruct well enough for scores to mean something."""
    root = tiny.root / "agreement"
    folders = []
    for name, architecture, k in (("topk4", "topk", 4), ("topk12", "topk", 12), ("standard", "standard", None)):
        sae = make_sae(architecture, seed=5, d_sae=64, k=k)
        sae.W_enc.data *= 0.6
        sae.b_dec.data = torch.from_numpy(tiny.activations["blocks.1.resid_post"].numpy().mean((0, 1)))
        if architecture == "standard":
            sae.b_enc.data -= 0.3
        folders.append(str(sae.save(root / name)))
    np.save(root / "tokens.npy", tiny.tokens[tiny.held_out].astype(np.int64))
    script = Path(__file__).with_name("saelens_evals.py")
    run_peers(script, tiny.root / "model", root / "tokens.npy", 0, root / "saelens.json", *folders)
    theirs = json.loads((root / "saelens.json").read_text())
    settings = {"store": str(tiny.store), "output": str(root / "out"), "feature_rows": 0, "bootstrap_samples": 0}
    ours = evaluate(EvaluateConfig(saes=folders, **settings))
    return {row["name"]: (row, theirs[folder]) for row, folder in zip(ours, folders, strict=True)}, root / "out"


def test_every_metric_that_both_define(both):
    lines = []
    for name, (ours, theirs) in both[0].items():
        for mine, its in SAME.items():
            lines.append(f"{name} {mine}: {ours[mine]:.8g} {theirs['whole'][its]:.8g}")
            assert ours[mine] == pytest.approx(theirs["whole"][its], rel=1e-4, abs=1e-7), lines[-1]
    print("\n".join(lines))


def test_every_latent(both):
    results, output = both
    for name, (_, theirs) in results.items():
        latents = pq.read_table(output / "latents" / f"{name}.parquet")
        np.testing.assert_allclose(latents["density"], theirs["whole"]["feature_density"], atol=1e-7)
        cosine = theirs["whole"]["encoder_decoder_cosine_sim"]
        np.testing.assert_allclose(latents["encoder_decoder_cosine"], cosine, atol=1e-5)


def test_what_is_known_to_be_wrong_in_saelens(both):
    """Its bias is a mean of per-batch ratios, so it moves with the batch size; ours does not."""
    for ours, theirs in both[0].values():
        for name in ("explained_variance", "mse", "l0", "ce_loss_score", "kl_div_score"):
            assert theirs["batches"][name] == pytest.approx(theirs["whole"][name], rel=1e-4), name
        bias = [theirs[how]["relative_reconstruction_bias"] for how in ("whole", "batches")]
        assert bias[0] == pytest.approx(ours["relative_reconstruction_bias"], rel=1e-4)
        assert abs(bias[1] - bias[0]) > 1e-4 * abs(bias[0])
        legacy = [theirs[how]["explained_variance_legacy"] for how in ("whole", "batches")]
        assert abs(legacy[1] - legacy[0]) > 1e-3
        assert abs(legacy[0] - ours["explained_variance"]) > 1e-4
