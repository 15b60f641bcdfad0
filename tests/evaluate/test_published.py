"""Published SAEs of other formats are evaluated like others, with what their releases state beside it."""

import json

import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.shared.sae import Sae


def test_published_figures_stand_beside_those_measured_here(tiny, make_sae, tmp_path, capsys):
    d_in = make_sae().d_in
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(d_in, 24, generator=generator),
        "b_enc": torch.zeros(24),
        "W_dec": torch.randn(24, d_in, generator=generator),
        "b_dec": torch.zeros(d_in),
        "threshold": torch.full((24,), 0.5),
    }
    metadata = {"published": {"l0": 7}, "model_name": "m"}
    sae = Sae("jumprelu", tensors, hook_point="blocks.1.resid_post", metadata=metadata)
    sae.save(tmp_path / "saes" / "resid_post" / "layer_1_width_16k_l0_small", "gemma-scope-2")
    make_sae().save(tmp_path / "saes" / "layers.1", "sparsify")
    normalised = make_sae(seed=3)
    normalised.normalize_activations = "layer_norm"
    normalised.save(tmp_path / "saes" / "layer_norm")
    (tmp_path / "saes" / "unknown").mkdir()
    (tmp_path / "saes" / "unknown" / "weights.pt").write_bytes(b"no archive")
    config = EvaluateConfig(
        store=str(tiny.store),
        saes=str(tmp_path / "saes"),
        output=str(tmp_path / "out"),
        model=False,
        feature_rows=0,
        allow_other_model=True,
    )
    rows = {row["name"]: row for row in evaluate(config)}
    printed = capsys.readouterr()
    assert f"note: '{tmp_path / 'saes' / 'unknown'}' has weights.pt, which no known format has" in printed.err
    row = rows["layer_1_width_16k_l0_small"]
    x = tiny.activations["blocks.1.resid_post"].float()[tiny.usable]
    l0 = float((sae.encode(x) > 0).sum(1).float().mean())
    assert row["l0"] == pytest.approx(l0)
    assert f"published  layer_1_width_16k_l0_small: L0 7.0, here {l0:.1f}" in printed.out + printed.err
    y = normalised(x)
    variance = float((x - x.mean(0)).square().sum())
    assert rows["layer_norm"]["explained_variance"] == pytest.approx(
        1 - float((x - y).square().sum()) / variance, rel=1e-4
    )
    saved = {row["name"]: row for row in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    assert saved["layer_1_width_16k_l0_small"]["published_l0"] == 7.0
    assert saved["layers.1"]["published_l0"] is None
    assert saved["layers.1"]["k"] == 4
