"""SAEs that choose twice: latents, thresholds and files against float64 NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from thresher.shared.core.errors import SaeError
from thresher.shared.exchange.describe import selection
from thresher.shared.sae import Sae
from thresher.shared.sae.leave_one_out import refined
from thresher.shared.sae.refinement import half_of_mean, leave_one_out, sparse_decode

D_IN, D_SAE = 6, 15


def jumprelu_sae(architecture="jumprelu", norm=1.0, **config):
    generator = torch.Generator().manual_seed(0)
    W_dec = norm * torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    tensors = {"W_enc": W_dec.T + 0.1 * torch.randn(D_IN, D_SAE, generator=generator), "W_dec": W_dec}
    tensors |= {"b_enc": 0.1 * torch.randn(D_SAE, generator=generator), "b_dec": torch.full((D_IN,), 0.3)}
    tensors |= {"threshold": torch.full((D_SAE,), 0.5), "first_threshold": torch.linspace(0.2, 0.6, D_SAE)}
    return Sae(architecture, tensors, hook_point="h", config=config)


def arrays(sae):
    return {name: value.double().numpy() for name, value in sae.named_parameters()}


def rows(n=40):
    return 2 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1)) + 0.3


def chosen(pre_acts, threshold):
    return pre_acts.clip(0) * (pre_acts > threshold)


def test_lista_encodes_a_share_of_the_residual_again():
    sae, x = jumprelu_sae("lista", refine_rate=0.4), rows()
    t, x64 = arrays(sae), x.double().numpy()
    first = chosen((x64 - t["b_dec"]) @ t["W_enc"] + t["b_enc"], t["first_threshold"])
    u = x64 + 0.4 * (x64 - first @ t["W_dec"] - t["b_dec"])
    expected = chosen((u - t["b_dec"]) @ t["W_enc"] + t["b_enc"], t["threshold"])
    assert ((first > 0) != (expected > 0)).any()
    np.testing.assert_allclose(sae.encode(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [1.0, 1.7])
def test_leave_one_out_is_the_best_value_without_the_others_change(norm):
    """Each kept latent's value minimises the error where all others keep their first values."""
    sae, x = jumprelu_sae("leave_one_out", norm), rows()
    t, x64 = arrays(sae), x.double().numpy()
    first = chosen((x64 - t["b_dec"]) @ t["W_enc"] + t["b_enc"], t["first_threshold"])
    expected = np.zeros_like(first)
    for row, latent in zip(*first.nonzero(), strict=True):
        others = first[row].copy()
        others[latent] = 0
        target = x64[row] - t["b_dec"] - others @ t["W_dec"]
        best = np.linalg.lstsq(t["W_dec"][latent][:, None], target, rcond=None)[0][0]
        expected[row, latent] = best if best > t["threshold"][latent] else 0
    assert 0 < (expected > 0).sum() < (first > 0).sum()
    np.testing.assert_allclose(sae.encode(x), expected, rtol=1e-4, atol=1e-5)


def test_sums_over_active_latents_are_those_over_all():
    latents = torch.rand(5, 3, D_SAE) * (torch.rand(5, 3, D_SAE) > 0.7)
    latents[0, 0] = 0
    W_dec = jumprelu_sae().W_dec
    torch.testing.assert_close(sparse_decode(latents, W_dec), latents @ W_dec)
    left = torch.randn(5, 3, D_IN)
    found = leave_one_out(latents, left, W_dec)
    torch.testing.assert_close(found, torch.where(latents > 0, latents + left @ W_dec.T, 0), rtol=1e-4, atol=1e-5)


def test_thresholds_are_half_of_the_mean_above_them():
    """Whatever the blocks: a latent that is absent, with noise, or present at about 4."""
    generator = torch.Generator().manual_seed(2)
    present = torch.rand(4000, 3, generator=generator) < torch.tensor([0.3, 0.05, 0.0])
    scores = torch.where(
        present,
        4 + 0.5 * torch.randn(4000, 3, generator=generator),
        0.5 * torch.randn(4000, 3, generator=generator).abs(),
    )
    scores[:, 2] = 0
    found = half_of_mean(scores.split(700)).double().numpy()
    for latent in (0, 1):
        s = scores[:, latent].double().numpy()
        assert found[latent] == pytest.approx(s[s > found[latent]].mean() / 2, abs=0.02)
        assert found[latent] == pytest.approx(2, abs=0.1)
    assert found[2] == 0
    with pytest.raises(SaeError, match="no rows"):
        half_of_mean([])


def test_a_refined_sae_starts_from_the_first_choice_and_keeps_its_thresholds(tmp_path):
    sae, x = jumprelu_sae(), rows(500)
    again = refined(sae, x.split(64))
    assert torch.equal(again.first_threshold, sae.threshold)
    first = sae.encode(x)
    scores = torch.where(first > 0, first + (x - first @ sae.W_dec - sae.b_dec) @ sae.W_dec.T, 0)
    torch.testing.assert_close(again.threshold, half_of_mean(scores.split(64)), rtol=1e-2, atol=1e-2)
    loaded = Sae.load(again.save(tmp_path / "refined"))
    assert torch.equal(loaded.encode(x), again.encode(x))
    assert "a second time" in selection(loaded)


@pytest.mark.parametrize("kind", ["lista", "leave_one_out"])
def test_no_other_format_holds_it_and_decoder_norms_fold(tmp_path, kind):
    sae, x = jumprelu_sae(kind, 1.7, **({"refine_rate": 0.4} if kind == "lista" else {})), rows()
    for format in ("dictionary_learning", "sparsify", "gemma-scope"):
        with pytest.raises(SaeError):
            sae.save(tmp_path / format, format)
        assert not (tmp_path / format).exists()
    before = sae(x).clone()
    sae.fold_decoder_norm()
    torch.testing.assert_close(sae(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_a_damaged_rate_is_one_line(tmp_path):
    path = jumprelu_sae("lista", refine_rate=0.4).save(tmp_path / "sae") / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"refine_rate": -1}))
    with pytest.raises(SaeError, match="refine_rate -1, expected a number above 0"):
        Sae.load(tmp_path / "sae")


def test_what_cannot_be_refined_says_why():
    topk = jumprelu_sae("topk", k=3)
    with pytest.raises(SaeError, match="chooses the k largest"):
        refined(topk, [rows()])


@pytest.mark.parametrize(
    "kind", ["jumprelu", "standard", "topk", "abstopk", "matching_pursuit", *("lista", "leave_one_out")]
)
def test_only_latents_that_depend_on_nothing_else_are_encoded_alone(kind):
    own = {"lista": {"refine_rate": 0.4}, "topk": {"k": 3}, "abstopk": {"k": 3}}
    sae, x, some = jumprelu_sae(kind, **own.get(kind, {})), rows(), torch.tensor([3, 11])
    assert sae.encodes_alone is (kind in ("jumprelu", "standard"))
    if sae.encodes_alone:
        torch.testing.assert_close(sae.encode_some(x, some), sae.encode(x)[:, some])
