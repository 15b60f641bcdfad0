"""The full suite: pursuit, stability and first letters, computed another way."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.evaluate.saes.sae_folders import EvaluatedSae
from thresher.evaluate.suite.amortisation import gradient_pursuit
from thresher.evaluate.suite.first_letter import first_letters
from thresher.evaluate.suite.stability import matched_cosines

HOOK = "blocks.1.resid_post"


def test_pursuit_equals_the_definition_row_by_row():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(20, 8, generator=generator).double(), torch.randn(30, 8, generator=generator).double()
    l0 = torch.arange(20) % 6
    found = gradient_pursuit(x, W, l0).numpy()
    for row, target, k in zip(found, x.numpy(), l0.tolist(), strict=True):
        code, support = np.zeros(30), []
        for _ in range(k):
            gradient = W.numpy() @ (target - code @ W.numpy())
            cosines = gradient / np.linalg.norm(W.numpy(), axis=1)
            cosines[support] = -np.inf
            if cosines.max() > 0:
                support.append(int(cosines.argmax()))
            along = np.zeros(30)
            along[support] = gradient[support]
            change = along @ W.numpy()
            code = np.clip(code + (along @ along) / max(change @ change, 1e-12) * along, 0, None)
        np.testing.assert_allclose(row, code, rtol=1e-9, atol=1e-12)


def test_stability_is_the_best_matching_of_repetitions(make_sae):
    saes = [
        EvaluatedSae(str(seed), Path(), make_sae(k=k, seed=seed, d_sae=5), HOOK, HOOK)
        for seed, k in ((1, 3), (2, 3), (3, 2))
    ]
    for sae, seed in zip(saes, (1, 2, 3), strict=True):
        sae.sae.config["seed"] = seed
    alive = {sae.name: SimpleNamespace(firings=np.ones(5, dtype=np.int64)) for sae in saes}
    found = matched_cosines(saes, alive)
    a, b = (sae.sae.W_dec.double().numpy() for sae in saes[:2])
    best = max(sum(float(a[i] @ b[j]) for i, j in enumerate(order)) / 5 for order in permutations(range(5)))
    assert found == {name: {"seed_stability": pytest.approx(best, abs=1e-5), "repetitions": 1} for name in ("1", "2")}


def test_stability_over_halves_is_that_of_the_other_half_alone(make_sae):
    saes = []
    for name, half, seed in (("a", "even", 1), ("b", "odd", 2), ("c", None, 3)):
        sae = make_sae(seed=seed, d_sae=5)  # other weights, as another half of the data gives
        sae.config["seed"] = 0
        sae.metadata |= {} if half is None else {"documents": half}
        saes.append(EvaluatedSae(name, Path(), sae, HOOK, HOOK))
    alive = {sae.name: SimpleNamespace(firings=np.ones(5, dtype=np.int64)) for sae in saes}
    a, b = (sae.sae.W_dec.double().numpy() for sae in saes[:2])
    best = max(sum(float(a[i] @ b[j]) for i, j in enumerate(order)) / 5 for order in permutations(range(5)))
    assert matched_cosines(saes, alive) == {name: {"half_stability": pytest.approx(best, abs=1e-5)} for name in "ab"}


def test_letters_are_those_of_the_text_after_its_space():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"▁apple": 0, "▁Zoo": 1, "▁9a": 2, "▁éa": 3, "b": 4, "▁": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁apple"))
    tokenizer.decoder = decoders.Metaspace()
    found = first_letters(np.array([[0, 1, 2], [3, 4, 5]]), PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert found.tolist() == [[0, 25, -1], [-1, 1, -1]]


def test_the_full_suite_adds_its_metrics(tiny, make_sae):
    for seed in (1, 2):
        make_sae(k=3, seed=seed).save(tiny.root / "repeated" / f"seed-{seed}")
    output = tiny.root / "full"
    config = EvaluateConfig(
        store=str(tiny.store),
        saes=str(tiny.root / "repeated"),
        output=str(output),
        suite="full",
        bootstrap_samples=0,
        feature_rows=0,
        model=False,
    )
    rows = {row["name"]: row for row in evaluate(config)}
    assert {row["baseline"] for row in rows.values()} == {None, "pca", "neurons"}
    for row in rows.values():
        gap = row["pursuit_explained_variance"] - row["explained_variance"]
        assert row["amortisation_gap"] == pytest.approx(gap, abs=1e-4)
    sums = [rows[name]["seed_stability"] * (1 - rows[name]["dead_fraction"]) for name in ("seed-1", "seed-2")]
    assert sums[0] == pytest.approx(sums[1], abs=1e-6)  # the same pairs, per live latent of each
