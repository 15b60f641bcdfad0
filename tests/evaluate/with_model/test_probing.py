"""k-sparse probing: the regression against torch's own optimiser, tasks that are fair, answers that are known."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.metrics.held_out import held_out
from thresher.evaluate.saes.sae_folders import EvaluatedSae
from thresher.evaluate.with_model.probing import (
    MIN_ROWS_PER_SPLIT,
    fit_logistic,
    mean_accuracies,
    next_token_tasks,
    next_tokens,
    probe_hits,
    select_latents,
    sparse_probing,
)
from thresher.shared.core.errors import StoreError
from thresher.shared.store import ActivationStore

CONFIG = EvaluateConfig(store="store", saes="saes", output="output", probe_tasks=3)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.3, 3, 300]))
def test_regression_is_at_the_optimum(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    labels = (x[:, 0] + scale * torch.randn(60, generator=generator, dtype=torch.float64) > 0).double()
    weights, bias = fit_logistic(x, labels)
    w = weights.clone().requires_grad_()
    b = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w + b, labels, reduction="sum")
    (loss + 0.5 * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-5 * scale
    assert b.grad.abs() < 1e-5


def test_separable_classes_are_found():
    x = torch.cat([torch.full((30, 1), 5.0), torch.full((30, 1), -5.0)])
    labels = torch.cat([torch.ones(30), torch.zeros(30)]).double()
    assert probe_hits(x, labels, x, labels).all()
    assert not probe_hits(x, labels, -x, labels).any()


def test_constant_latents_do_not_break_the_fit():
    labels = torch.cat([torch.ones(30), torch.zeros(30)]).double()
    weights, bias = fit_logistic(torch.zeros(60, 3), labels)
    assert weights.abs().max() == 0
    assert bias == pytest.approx(0)


def test_selection_takes_the_largest_mean_difference():
    labels = torch.tensor([1.0, 1, 0, 0])
    latents = torch.tensor([[1.0, 0, 9, 2], [1, 0, 9, 2], [0, 3, 9, 1], [0, 3, 9, 0]])
    assert select_latents(latents, labels, 2).tolist() == [1, 3]
    assert len(select_latents(latents, labels, 9)) == 4


def test_a_masked_token_is_no_next_token():
    tokens = np.array([[0, 5, 6, 0, 7], [5, 0, 0, 8, 9]])
    expected = [[5, 6, -1, 7, -1], [-1, -1, 8, 9, -1]]
    assert next_tokens(tokens, tokens != 0).tolist() == expected


def test_tasks_are_balanced_and_split_by_document():
    rng = np.random.default_rng(0)
    following = rng.choice([-1, 3, 7, 9], p=[0.1, 0.5, 0.3, 0.1], size=4000)
    group = rng.integers(0, 40, 4000)
    tasks = next_token_tasks(following, group, 2, 0)
    assert [task.token for task in tasks] == [3, 7]
    for task in tasks:
        for rows, labels in ((task.train, task.train_labels), (task.test, task.test_labels)):
            assert labels.mean() == 0.5
            assert len(rows) >= MIN_ROWS_PER_SPLIT
            np.testing.assert_array_equal(following[rows] == task.token, labels == 1)
            assert following[rows].min() >= 0
        assert not set(group[task.train]) & set(group[task.test])
    assert [t.train.tolist() for t in next_token_tasks(following, group, 2, 0)] == [t.train.tolist() for t in tasks]


def test_intervals_are_those_of_resampled_documents():
    """Against a plain bootstrap: draw documents, take all their test rows, and average over tasks."""
    rng = np.random.default_rng(1)
    following, group = rng.choice([3, 7, 9], 6000), rng.integers(0, 600, 6000)
    tasks = next_token_tasks(following, group, 2, 0)
    hits = [torch.from_numpy(rng.random(len(task.test)) < 0.6 + 0.3 * (group[task.test] % 10 == 0)) for task in tasks]
    found = mean_accuracies(tasks, {"right": hits}, msgspec.structs.replace(CONFIG, bootstrap_samples=4000))
    assert found["right"] == pytest.approx(np.mean([hit.double().mean() for hit in hits]))
    documents = np.unique(np.concatenate([group[task.test] for task in tasks]))
    samples = []
    for _ in range(4000):
        drawn = rng.choice(documents, len(documents))
        rows = [np.concatenate([np.flatnonzero(group[task.test] == one) for one in drawn]) for task in tasks]
        samples.append(np.mean([hit.numpy()[some].mean() for hit, some in zip(hits, rows, strict=True)]))
    expected = np.quantile(samples, [0.025, 0.975])
    assert expected[1] - expected[0] > 0.02
    np.testing.assert_allclose(found["confidence_95"]["right"], expected, atol=0.004)


def test_too_few_rows_are_refused(tiny, make_sae):
    sae = EvaluatedSae("sae", None, make_sae(), "blocks.1.resid_post", "blocks.1.resid_post")
    with pytest.raises(StoreError, match="too few held-out rows"):
        sparse_probing([sae], held_out(ActivationStore.open(tiny.store)), CONFIG)


def test_a_latent_that_knows_the_next_token(tiny, make_sae, monkeypatch):
    """With the rows replaced by one-hot next tokens, one latent answers each question and chance is a half."""
    rows = held_out(ActivationStore.open(tiny.store))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4, (15, 400))
    rows.__dict__.update(
        contexts=np.arange(15), usable=np.ones((15, 400), bool), group=np.repeat(np.arange(15)[:, None], 400, 1)
    )
    following = torch.from_numpy(np.concatenate([tokens[:, 1:], np.zeros((15, 1), int)], 1).reshape(-1))
    x = torch.nn.functional.one_hot(following, 16).float()
    block = type("Block", (), {"activations": {"h": x}})
    monkeypatch.setattr(type(rows), "blocks", lambda *_: iter([block]))
    monkeypatch.setattr(type(rows), "token_batches", lambda *_: iter([(torch.from_numpy(tokens), None)]))
    sae = make_sae("standard", d_sae=16, seed=0)
    sae.W_enc.data, sae.b_enc.data, sae.b_dec.data = torch.eye(16), torch.zeros(16), torch.zeros(16)
    result = sparse_probing([EvaluatedSae("sae", None, sae, "h", "h")], rows, CONFIG)["sae"]
    assert result["probe_tasks"] == 3
    assert result["probe_accuracy_k1"] == 1
    assert result["probe_accuracy_activations"] == 1
    assert result["confidence_95"]["probe_accuracy_k1"] == [1, 1]
