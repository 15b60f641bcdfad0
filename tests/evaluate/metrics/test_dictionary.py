"""Dictionary geometry against plain NumPy, and on dictionaries whose relation is known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from thresher.evaluate.metrics import dictionary
from thresher.evaluate.metrics.comparison import compare_dictionaries, pair_kind, training_settings
from thresher.evaluate.metrics.dictionary import (
    best_matches,
    compare_directions,
    decoder_directions,
    dictionary_summary,
    encoder_decoder_cosine,
    live,
    nearest_neighbours,
)
from thresher.evaluate.metrics.latent_sums import LatentSums
from thresher.evaluate.saes.sae_folders import EvaluatedSae
from thresher.shared.sae.leave_one_out import refined


def cosines(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


@pytest.fixture(params=[1 << 25, 70])
def block_size(request, monkeypatch):
    monkeypatch.setattr(dictionary, "COSINES", request.param)


@pytest.mark.usefixtures("block_size")
def test_neighbours_and_matches(make_sae):
    a, b = make_sae(d_sae=33, seed=1), make_sae(d_sae=47, seed=2)
    a.W_dec.data *= torch.linspace(0.1, 5, 33)[:, None]
    expected = cosines(a.W_dec, a.W_dec)
    np.fill_diagonal(expected, -np.inf)
    values, indices = nearest_neighbours(decoder_directions(a), 3)
    np.testing.assert_array_equal(indices, np.argsort(-expected, axis=1)[:, :3])
    np.testing.assert_allclose(values, -np.sort(-expected, axis=1)[:, :3], rtol=1e-5)
    between = cosines(a.W_dec, b.W_dec)
    values, indices = best_matches(decoder_directions(a), decoder_directions(b))
    np.testing.assert_array_equal(indices, between.argmax(1))
    np.testing.assert_allclose(values, between.max(1), rtol=1e-5)


def test_encoder_decoder_cosine(make_sae):
    sae = make_sae(seed=3)
    torch.testing.assert_close(encoder_decoder_cosine(sae), torch.ones(32))
    sae.W_enc.data = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(encoder_decoder_cosine(sae), np.diag(cosines(sae.W_enc.T, sae.W_dec)), atol=1e-6)


def test_more_neighbours_asked_for_than_there_are():
    values, _ = nearest_neighbours(torch.eye(3), 10)
    assert values.shape == (3, 2)
    assert dictionary_summary(np.zeros(0), None) == {}


def test_a_permuted_dictionary_is_the_same_one():
    directions = torch.nn.functional.normalize(torch.randn(40, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    result = compare_directions(directions, directions[torch.randperm(40, generator=torch.Generator().manual_seed(1))])
    assert result["shared"] == 1
    assert result["mean_max_cosine_ab"] == pytest.approx(1, abs=1e-6)
    assert (result["children_per_parent"], result["split_parents"], result["novel"]) == (1, 0, 0)


def test_splitting_is_counted():
    """Of four directions, two are kept, one splits in three, one disappears; two are new."""
    eye = torch.eye(12)
    a = eye[:4]
    split = torch.nn.functional.normalize(eye[2] + 0.3 * eye[5:8], dim=1)
    b = torch.cat([eye[:2], split, eye[9:11]])
    result = compare_directions(a, b)
    assert result["children_per_parent"] == pytest.approx((1 + 1 + 3) / 3)
    assert result["split_parents"] == 0.25
    assert result["novel"] == pytest.approx(2 / 7)
    assert result["shared"] == 0.75
    assert compare_directions(a[:0], b) == {"n_a": 0, "n_b": 7}


def test_dead_latents_are_left_out_and_pairs_are_named(make_sae):
    saes = [
        EvaluatedSae("wide", None, make_sae(d_sae=48, seed=1), "h", "h"),
        EvaluatedSae("one", None, make_sae(d_sae=32, seed=1), "h", "h"),
        EvaluatedSae("two", None, make_sae(d_sae=32, seed=2), "h", "h"),
        EvaluatedSae("elsewhere", None, make_sae(d_sae=32, seed=2), "other", "other"),
    ]
    latents = {}
    for sae in saes:
        latents[sae.name] = LatentSums(sae.sae.d_sae)
        activations = torch.ones(1, sae.sae.d_sae)
        activations[0, ::4] = 0
        latents[sae.name].add_dense(activations, activations)
    rows = compare_dictionaries(saes, latents)
    assert [(row["a"], row["b"], row["kind"]) for row in rows] == [
        ("one", "wide", "widths"),
        ("two", "wide", "widths"),
        ("one", "two", "seeds"),
    ]
    assert (rows[0]["n_a"], rows[0]["n_b"]) == (24, 36)
    assert len(live(decoder_directions(saes[1].sae), latents["one"].firings)) == 24


def test_pair_kinds():
    topk = {"architecture": "topk", "d_sae": 8, "k": 2, "l1_coefficient": None}
    assert pair_kind(topk, topk | {"d_sae": 16, "k": 4}) == "widths"
    assert pair_kind(topk, topk | {"k": 4}) == "other"
    assert pair_kind(topk, topk | {"architecture": "standard", "d_sae": 16}) == "other"
    assert pair_kind(topk | {"seed": 0}, topk | {"seed": 1}) == "seeds"
    even, odd = topk | {"documents": "even", "seed": 0}, topk | {"documents": "odd", "seed": 0}
    assert pair_kind(even, odd) == "halves"
    assert pair_kind(even, odd | {"seed": 1}) == pair_kind(even, odd | {"k": 4}) == "other"
    assert pair_kind(even, topk | {"seed": 0}) == "other"  # one is trained on what the other is, too
    assert pair_kind(topk | {"lr": 1e-3}, topk | {"lr": 3e-3}) == "other"


def test_jumprelu_saes_of_other_targets_or_trained_as_another_kind_are_no_seeds(make_sae):
    jumprelu = [{"target_l0": target, "seed": seed} for target, seed in ((20, 0), (35, 0), (20, 1))]
    saes = [EvaluatedSae(str(i), None, make_sae("standard", **config), "h", "h") for i, config in enumerate(jumprelu)]
    saes.append(EvaluatedSae("batch", None, make_sae("standard", **jumprelu[0]), "h", "h"))
    saes[-1].sae.config["architecture"] = "batch_topk"
    described = [sae.description() for sae in saes]
    assert [row["target_l0"] for row in described] == [20, 35, 20, 20]
    assert [row["architecture"] for row in described] == [*["standard"] * 3, "batch_topk"]
    latents = {sae.name: LatentSums(sae.sae.d_sae) for sae in saes}
    for sums in latents.values():
        sums.add_dense(torch.ones(1, 32), torch.ones(1, 32))
    kinds = {(row["a"], row["b"]): row["kind"] for row in compare_dictionaries(saes, latents)}
    assert {pair for pair, kind in kinds.items() if kind == "seeds"} == {("0", "2")}


def test_a_refined_sae_is_no_repetition_of_the_one_it_was_made_from(make_sae):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    first, second = make_sae("standard", seed=0), make_sae("standard", seed=1)
    for seed, sae in enumerate((first, second)):
        sae.config |= {"architecture": "standard", "seed": seed, "apply_b_dec_to_input": True}  # as training saves it
    saes = {"first": first, "refined": refined(first, [x]), "second": second, "second refined": refined(second, [x])}
    settings = {name: training_settings(EvaluatedSae(name, None, sae, "h", "h")) for name, sae in saes.items()}
    kinds = {pair: pair_kind(*(settings[name] for name in pair)) for pair in combinations(saes, 2)}
    assert {pair for pair, kind in kinds.items() if kind == "seeds"} == {
        ("first", "second"),
        ("refined", "second refined"),
    }
