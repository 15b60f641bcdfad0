"""Causal scores: what steering a latent does to the share of generated tokens on which its rule fires."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from thresher.evaluate.explain.causal import Continuations, WrittenTexts, difference
from thresher.evaluate.explain.config import ExplainConfig
from thresher.evaluate.explain.rules.search import Part, predicted
from thresher.evaluate.explain.rules.views import build_views
from thresher.evaluate.explain.run import explain
from thresher.evaluate.features.token_text import TokenTexts
from thresher.shared.core.errors import ConfigError

from .test_rules import DEF, OPEN, SIZE, WORDS, make_corpus


class Tokenizer:
    """The words of the known corpus by number: all that is asked of a tokenizer here."""

    added_tokens_decoder: dict = {}

    def __len__(self):
        return len(WORDS)


def test_rules_hold_on_generated_text_where_plain_rules_say(monkeypatch):
    """Every part that the views can say holds on the same new tokens as in a corpus that has them from the start."""
    texts = TokenTexts(dict(enumerate(WORDS)), {})
    monkeypatch.setattr(TokenTexts, "of", lambda tokenizer, ids: texts)
    corpus = make_corpus()
    views = build_views(corpus, texts)
    rng = np.random.default_rng(4)
    begins, new = 20, rng.integers(0, len(WORDS), (2, 3, SIZE)).astype(np.int32)
    prompt = corpus.n_train + SIZE * np.array([0, 3, 7])
    length = np.array([[SIZE, 50, 21], [SIZE, SIZE, 20]])
    for row, start in enumerate(prompt):
        new[:, row, :begins] = corpus.tokens[start : start + begins]
    written = [Continuations(new[i], length[i], prompt, begins) for i in range(2)]
    rules = [(Part(((view, value),), 1.0, 1.0),) for view in range(len(views)) for value in _some(views[view], rng)]
    rules.append((Part(((0, DEF), (5, OPEN)), 1.0, 1.0),))
    small = WrittenTexts(corpus, views, rules, written, Tokenizer())  # pyright: ignore[reportArgumentType]
    whole = make_corpus(n_test=46)
    whole.tokens[: corpus.n_rows], whole.tokens[corpus.n_rows :] = corpus.tokens, new.reshape(-1)
    whole_views = build_views(whole, texts)
    usable = (np.arange(SIZE) < length[:, :, None])[:, :, begins:]
    for rule in rules:
        there = tuple(
            Part(tuple((v, int(whole_views[v].value[views[v].rows_with(i)[0]])) for v, i in part.conditions), 1.0, 1.0)
            for part in rule
        )
        rows, _ = predicted(whole, whole_views, there, corpus.n_rows, whole.n_rows)
        expected = np.zeros(whole.n_rows, bool)
        expected[rows] = True
        expected = expected[corpus.n_rows :].reshape(2, 3, SIZE)[:, :, begins:] & usable
        assert np.array_equal(small.fires_on(rule), expected), rule
    tokens = new[:, :, begins:]
    assert np.array_equal(small.fires_on(rules[-1]), (tokens == DEF) & (new[:, :, begins - 1 : -1] == OPEN) & usable)


def _some(view, rng):
    there = np.unique(view.value[view.value >= 0])
    return rng.choice(there, min(4, len(there)), replace=False).tolist()


def test_the_difference_is_of_shares_of_all_tokens_with_its_interval():
    rng = np.random.default_rng(0)
    generated = rng.integers(1, 9, (2, 12))
    fires = rng.integers(0, generated + 1)
    found, low, high = difference(fires, generated, 4000, 0)
    assert found == pytest.approx(fires[0].sum() / generated[0].sum() - fires[1].sum() / generated[1].sum())
    drawn = rng.integers(0, 12, (4000, 12))
    resampled = [fires[way][drawn].sum(1) / generated[way][drawn].sum(1) for way in (0, 1)]
    assert (low, high) == pytest.approx(np.quantile(resampled[0] - resampled[1], [0.025, 0.975]), abs=0.02)
    assert np.isnan(difference(fires[:, :1], generated[:, :1], 100, 0)[1:]).all()


@pytest.fixture(scope="module")
def promoting(tiny, words, tmp_path_factory):
    """An evaluation, with its model, of an SAE whose latents write the directions that the model reads tokens off.

    Latent i is read where token i is, and writes what makes token i the next one, so that its rule is its cause.
    """
    from transformers import AutoModelForCausalLM

    from thresher.evaluate.config import EvaluateConfig
    from thresher.evaluate.run import evaluate
    from thresher.shared import ActivationStore
    from thresher.shared.sae import Sae

    root = tmp_path_factory.mktemp("promoting")
    model = AutoModelForCausalLM.from_pretrained(tiny.root / "model")
    store = ActivationStore.open(tiny.store)
    hook_point = "blocks.1.resid_post"
    x, tokens = store.read(hook_point, 0, store.n_rows).double(), store.tokens(0, store.n_rows).long()
    numbers = torch.arange(1, 9)
    targets = (tokens[:, None] == numbers).double()
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solved = torch.linalg.lstsq(ones, targets).solution
    read = ones @ solved  # a linear reading is far from perfect, so the threshold is what few rows exceed
    threshold = read.quantile(0.9, 0)
    unembedding = model.lm_head.weight.detach().double()
    W_dec = torch.nn.functional.normalize((unembedding - unembedding.mean(0))[numbers], dim=1)
    tensors = {
        "W_enc": (10 * solved[:-1]).float().contiguous(),
        "b_enc": (10 * (solved[-1] - threshold)).float(),
        "W_dec": W_dec.float(),
        "b_dec": torch.zeros(x.shape[1]),
    }
    Sae("standard", tensors, hook_point=hook_point, config={"l1_coefficient": 1.0}).save(root / "saes" / "promoting")
    saes = [str(root / "saes" / "promoting")]
    output = str(root / "evaluation")
    evaluate(EvaluateConfig(store=str(tiny.store), saes=saes, output=output, bootstrap_samples=0, probe_tasks=0))
    return root / "evaluation"


def config(evaluation, **changes):
    settings = {"window": 6, "n_score": 8, "bootstrap_samples": 100, "causal": True, "causal_strength": 40.0}
    return ExplainConfig(evaluation=str(evaluation), **(settings | changes))


def test_latents_that_write_what_they_read_have_high_causal_scores(promoting):
    [path] = explain(config(promoting, causal_tokens=6)).values()
    table = pq.read_table(path).to_pylist()
    steered = [line for line in table if line["explainer"] == "rules" and line["causal"] is not None]
    assert steered
    by_explainer = {
        name: np.mean([line["causal"] for line in table if line["explainer"] == name and line["causal"] is not None])
        for name in ("rules", "token frequency", "random latent")
    }
    assert by_explainer["token frequency"] > 0.3
    assert by_explainer["token frequency"] > by_explainer["random latent"] + 0.3
    for line in steered:
        assert line["causal_low"] <= line["causal"] <= line["causal_high"]
        assert -1 <= line["causal_clean"] <= 1
    again = path.read_bytes()
    path.unlink()
    explain(config(promoting, causal_tokens=6))
    assert path.read_bytes() == again


def test_few_latents_are_steered_if_so_asked_and_a_model_is_needed(promoting, evaluation):
    [path] = explain(config(promoting, causal_latents=2)).values()
    lines = [line for line in pq.read_table(path).to_pylist() if line["explainer"] == "rules"]
    assert sum(line["causal"] is not None for line in lines) == min(2, len(lines))
    with pytest.raises(ConfigError, match="causal = true needs the model"):
        explain(config(evaluation))
