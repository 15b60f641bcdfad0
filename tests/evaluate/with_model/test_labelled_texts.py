"""Probing on labelled texts: the means of a text's latents against plain transformers, and answers that are known."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.evaluate.saes.sae_folders import EvaluatedSae
from thresher.evaluate.with_model.labelled_texts import (
    LabelledTexts,
    label_probes,
    label_tasks,
    labelled_probing,
    read_labelled_texts,
)
from thresher.evaluate.with_model.probing import fit_logistic
from thresher.shared import ActivationStore
from thresher.shared.core.errors import ConfigError, MissingFileError
from thresher.shared.model.language_model import resolve_hook_points

HOOK, N = "blocks.0.resid_post", 240
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of the tiny model's ids: each is a word of its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def labelled():
    """Texts of 3 to 20 words; a third of each label has the word of its number twice, and nothing else tells them."""
    texts, labels = [], []
    for number in range(N):
        words = RNG.integers(10, 50, 3 + number % 18)
        label = number % 3
        words[RNG.choice(3, 2, replace=False)] = 1 + label
        texts.append(" ".join(f"w{word}" for word in words))
        labels.append(f"kind {label}")
    return LabelledTexts(texts, labels)


def pooled_by_hand(tiny, sae, texts):
    """Return the mean latents and activations of the first texts' words, up to the context, one text at a time."""
    latents, rows = [], []
    for text in texts:
        ids = torch.tensor([[int(word[1:]) for word in text.split()][:12]])
        with torch.no_grad():
            x = tiny.model.transformer(ids, output_hidden_states=True).hidden_states[1][0].double().numpy()
        pre_acts = (x - sae.b_dec.double().numpy()) @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
        smallest = np.sort(pre_acts, axis=1)[:, -sae.config["k"], None]
        latents.append((np.maximum(pre_acts, 0) * (pre_acts >= smallest)).mean(0))
        rows.append(x.mean(0))
    return np.array(latents), np.array(rows)


def test_accuracies_are_those_of_means_over_tokens(tiny, make_sae, tokenizer, labelled):
    sae, config = (
        make_sae(k=4, seed=1, hook_point=HOOK),
        EvaluateConfig(store="s", saes="s", output="o", model_rows=10**6, seed=3),
    )
    store = ActivationStore.open(tiny.store)
    found = labelled_probing(
        [EvaluatedSae("sae", None, sae, HOOK, HOOK)],
        label_probes(labelled, tokenizer, store, config),
        tiny.model,
        resolve_hook_points(tiny.model, [HOOK]),
        store,
        config,
    )["sae"]
    order = np.random.default_rng(3).permutation(N)
    texts = [labelled.texts[i] for i in order]
    latents, rows = pooled_by_hand(tiny, sae, texts)
    accuracies = {1: [], 16: [], "activations": []}
    for task in label_tasks([labelled.labels[i] for i in order], texts, 3):
        train, test, labels = task.train.numpy(), task.test.numpy(), task.train_labels.numpy()
        for k, values in accuracies.items():
            x = rows
            if k != "activations":
                difference = latents[train][labels == 1].mean(0) - latents[train][labels == 0].mean(0)
                x = latents[:, np.argsort(-abs(difference))[:k]]
            weights, bias = fit_logistic(torch.from_numpy(x[train]), task.train_labels)
            values.append(((x[test] @ weights.numpy() + bias > 0) == (task.test_labels.numpy() == 1)).mean())
    assert found["label_tasks"] == 3
    for k, values in accuracies.items():
        key = "label_accuracy_activations" if k == "activations" else f"label_accuracy_k{k}"
        assert found[key] == pytest.approx(np.mean(values), abs=0.01)  # a row on the edge may be on either side
    assert found["label_accuracy_activations"] > 0.8


def test_equal_texts_are_never_in_both_splits():
    texts = [f"text {number % 40}" for number in range(400)]
    for task in label_tasks([str(number % 2) for number in range(400)], texts, 0):
        train, test = ({texts[i] for i in rows.tolist()} for rows in (task.train, task.test))
        assert train
        assert test
        assert not train & test


def test_an_evaluation_has_the_accuracies_and_reads_changed_texts_anew(tiny, sweep, tokenizer, labelled, tmp_path):
    tiny.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(*labelled, strict=True)]
    file.write_text("\n".join([*lines, "", lines[0]]))
    assert read_labelled_texts(str(file)) == labelled
    keys = {"store": str(tiny.store), "saes": str(sweep), "bootstrap_samples": 0, "feature_rows": 0}
    keys |= {"model": str(tmp_path / "model"), "probe_texts": str(file), "output": str(tmp_path / "out")}
    rows = evaluate(**keys, probe_tasks=0, model_rows=4000)
    assert {row["label_tasks"] for row in rows} == {3}
    assert all(0.3 <= row[f"label_accuracy_k{k}"] <= 1 for row in rows for k in (1, 2, 5, 16))
    with pytest.raises(ConfigError, match="there is no model"):
        evaluate(**keys | {"model": False})
    with pytest.raises(ConfigError, match="too few texts"):
        evaluate(**keys | {"output": str(tmp_path / "unused")}, model_rows=100)
    assert not (tmp_path / "unused").exists()  # found out before any rows are read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b"}', 'line 2: expected an object like {"text"'),
        ('{"text": " ", "label": "x"}', "line 1"),
        ("no JSON", "line 1"),
        ('["a", "b"]', "line 1"),
        ('{"text": "a", "label": "x"}', "has 1 labels, expected at least two"),
        ("", "has 0 labels"),
    ],
)
def test_what_is_no_labelled_text_is_refused(tmp_path, content, message):
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message) if "{" in message else message):
        read_labelled_texts(str(tmp_path / "texts.jsonl"))
    with pytest.raises(MissingFileError, match="cannot be read"):
        read_labelled_texts(str(tmp_path / "none.jsonl"))
