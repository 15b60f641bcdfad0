"""SAEs whose latents may be negative, or are chosen one after another, are evaluated by what they compute."""

import json

import numpy as np
import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.features.build import build_feature_index
from thresher.evaluate.metrics.encoding import encode
from thresher.evaluate.metrics.latent_sums import LatentSums
from thresher.evaluate.run import evaluate
from thresher.evaluate.saebench import SaeBenchSae
from thresher.evaluate.saes.sae_folders import EvaluatedSae
from thresher.shared.core.errors import SaeError
from thresher.shared.sae import Sae

HOOK = "blocks.1.resid_post"


@pytest.fixture
def saes(make_sae):
    topk = make_sae()
    tensors = {name: value.detach() for name, value in topk.named_parameters()}
    return {
        "abstopk": Sae("abstopk", tensors, hook_point=HOOK, config={"k": 5}),
        "matching_pursuit": Sae("matching_pursuit", tensors, hook_point=HOOK, config={"max_iterations": 6}),
    }


def test_they_are_measured_and_the_signed_has_no_index(saes, tiny, tmp_path, capsys):
    for name, sae in saes.items():
        sae.save(tmp_path / "saes" / name)
    config = EvaluateConfig(
        store=str(tiny.store), saes=str(tmp_path / "saes"), output=str(tmp_path / "out"), model=False, probe_tasks=0
    )
    rows = {row["name"]: row for row in evaluate(config)}
    assert "SAE 'abstopk' has latents that may be negative, so that no feature index" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out" / "features").glob("*.parquet")} == {"matching_pursuit.parquet"}
    x = tiny.activations[HOOK].float()[tiny.usable]
    variance = float((x - x.mean(0)).square().sum())
    for name, sae in saes.items():
        latents = sae.encode(x).double().numpy()
        assert rows[name]["l0"] == pytest.approx((latents != 0).sum(1).mean())
        assert rows[name]["l1"] == pytest.approx(np.abs(latents).sum(1).mean())
        assert rows[name]["dead_fraction"] == pytest.approx((latents == 0).all(0).mean())
        assert rows[name]["explained_variance"] == pytest.approx(
            1 - float((x - sae(x)).square().sum()) / variance, rel=1e-4
        )
        encoded, sums = encode(sae, x), LatentSums(sae.d_sae)
        encoded.add_to(sums)
        size, fires = np.abs(latents), latents != 0
        np.testing.assert_allclose(sums.max_activation, size.max(0), rtol=1e-5)
        np.testing.assert_allclose(np.nan_to_num(sums.mean_activation), size.sum(0) / fires.sum(0).clip(1), rtol=1e-5)
    assert (saes["abstopk"].encode(x) < 0).any()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())[0]["k"] in (5, None)


def test_what_takes_no_negative_latents_says_so(saes, tiny, tmp_path):
    from thresher.shared import ActivationStore

    signed = EvaluatedSae("abstopk", tmp_path, saes["abstopk"], HOOK, HOOK)
    with pytest.raises(SaeError, match="a feature index takes latents that are never negative"):
        build_feature_index(ActivationStore.open(tiny.store), [signed], tmp_path)
    with pytest.raises(SaeError, match="SAEBench takes latents that are never negative"):
        SaeBenchSae(saes["abstopk"], "gpt2")
    with pytest.raises(SaeError, match="decoder norms of a matching_pursuit SAE cannot be folded"):
        SaeBenchSae(saes["matching_pursuit"], "gpt2")
    assert torch.equal(saes["abstopk"].encode_sparse(torch.zeros(0, saes["abstopk"].d_in))[0], torch.zeros(0, 5))
