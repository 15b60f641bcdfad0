"""The Neuronpedia batches against the feature index that they come from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from thresher.evaluate.features.build import FeatureSettings, build_feature_index
from thresher.evaluate.features.export import _interval, export_neuronpedia, pearson
from thresher.shared.store import ActivationStore

FIELDS = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values"),
    *("freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("n_prompts_total", "n_tokens_in_prompt", "dataset", "activations", "decoder_weights_dist"),
}


def test_batches_hold_what_the_index_holds(tiny, make_sae, words, tmp_path):
    sae = make_sae(k=3, d_sae=200)
    sae.b_enc.data[11] = -1e4
    named = SimpleNamespace(name="a", sae=sae, hook_point="blocks.1.resid_post", target="blocks.1.resid_post")
    settings = FeatureSettings(n_top=3, n_sampled=3, window=6)
    store = ActivationStore.open(tiny.store)
    index = build_feature_index(store, [named], tmp_path, model=tiny.model, tokenizer=words, settings=settings)["a"]
    paths = export_neuronpedia(index, tmp_path / "np", model_id="gpt2", layer=1, sae_set="res", dataset="text")
    assert [path.name for path in paths] == ["batch-0.json", "batch-1.json"]
    batches = [json.loads(path.read_text()) for path in paths]
    features = {feature["feature_index"]: feature for batch in batches for feature in batch["features"]}
    skipped = json.loads((tmp_path / "np" / "skipped_indexes.json").read_text())["skipped_indexes"]
    lines = [line for batch in index.batches() for line in batch]
    assert 11 in skipped
    assert sorted([*features, *skipped]) == list(range(200))
    assert {(batch["model_id"], batch["layer"], batch["sae_set"]) for batch in batches} == {("gpt2", 1, "res")}
    for number, feature in features.items():
        line = lines[number]
        assert set(feature) == FIELDS
        assert sum(feature["freq_hist_data_bar_heights"]) == line["firings"]
        mean = np.dot(feature["freq_hist_data_bar_values"], feature["freq_hist_data_bar_heights"]) / line["firings"]
        assert mean == pytest.approx(line["mean_activation"], abs=line["histogram_end"] / 64)
        assert len(feature["activations"]) == len(line["top"]) + len(line["sampled"])
        best = feature["activations"][0]
        assert feature["n_prompts_total"] == store.n_contexts
        assert best["tokens"] == [f" word{token}" for token in line["top"][0]["tokens"]]
        assert max(best["values"]) == pytest.approx(line["max_activation"], rel=2e-3)
        assert feature["pos_str"][0] == f" word{line['promoted'][0]['token']}"
        for sampled in feature["activations"][len(line["top"]) :]:
            assert sampled["bin_min"] - 1e-2 <= max(sampled["values"]) <= sampled["bin_max"] + 1e-2


def test_the_fifths_of_the_range_hold_every_firing():
    histogram = [0] * 64
    histogram[5], histogram[20], histogram[32] = 6, 3, 1  # the last bin's centre is beyond the largest activation
    line = {"max_activation": 1.01, "histogram_end": 2.0, "histogram": histogram}
    found = [_interval(1.01 * (i + 0.5) / 5, line) for i in range(5)]
    assert [share for _, _, share in found] == [0.6, 0, 0, 0.3, 0.1]
    assert _interval(1.01, line) == found[-1] == (0.808, 1.01, 0.1)


def test_pearson_from_the_cosine():
    rng = np.random.default_rng(0)
    a = rng.random(5000) < 0.2
    b = np.where(rng.random(5000) < 0.5, a, rng.random(5000) < 0.3)
    cosine = (a & b).sum() / np.sqrt(a.sum() * b.sum())
    found = pearson(np.array([cosine]), a.mean(), np.array([b.mean()]))
    np.testing.assert_allclose(found, np.corrcoef(a, b)[0, 1], rtol=1e-9)
    np.testing.assert_array_equal(pearson(np.array([1.0]), 1.0, np.array([1.0])), [0.0])
