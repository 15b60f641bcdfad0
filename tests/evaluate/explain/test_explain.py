"""`thresher explain` on an evaluation of the tiny model: files, report, export, and what it refuses."""

from __future__ import annotations

import base64
import gzip
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from thresher.evaluate.explain.config import ExplainConfig
from thresher.evaluate.explain.rules.surroundings import read_surroundings
from thresher.evaluate.explain.run import explain
from thresher.evaluate.explain.table import read_explanations
from thresher.evaluate.features.files import FeatureIndex
from thresher.shared.core.cli import run_guarded
from thresher.shared.core.errors import ConfigError, MissingFileError


@pytest.fixture(scope="module")
def explained(evaluation):
    return explain(ExplainConfig(evaluation=str(evaluation), window=6, n_score=8, bootstrap_samples=50))


def test_every_live_latent_has_an_explanation_and_two_baselines(evaluation, explained):
    assert list(explained) == ["topk_k10", "standard"]
    index = FeatureIndex.open(evaluation / "features" / "topk_k10.parquet")
    table = pq.read_table(explained["topk_k10"]).to_pylist()
    live = [line["latent"] for batch in index.batches() for line in batch if line["firings"]]
    for explainer in ("rules", "token frequency", "random latent"):
        assert [line["latent"] for line in table if line["explainer"] == explainer] == live
    for line in table:
        assert line["is_baseline"] == (line["explainer"] != "rules")
        for score in ("detection", "fuzzing", "intruder", "precision", "recall", "balanced_accuracy"):
            assert line[score] is None or 0 <= line[score] <= 1
            if line[f"{score}_low"] is not None:
                assert line[f"{score}_low"] <= line[f"{score}_high"]


def test_report_and_export_show_them(evaluation, explained):
    index = FeatureIndex.open(evaluation / "features" / "topk_k10.parquet")
    lines = read_explanations(index)
    batch = gzip.decompress((evaluation / "neuronpedia/topk_k10/explanations/batch-0.jsonl.gz").read_bytes())
    exported = [json.loads(line) for line in batch.splitlines()]
    assert [int(line["index"]) for line in exported] == sorted(lines)
    assert {line["explanationModelName"] for line in exported} == {"rules"}
    assert all(line["description"] == lines[int(line["index"])][0]["explanation"] for line in exported)
    page = (evaluation / "report.html").read_text()
    assert "explanationTable" in page
    assert _block(page, "sae0-0")[min(lines)]["explanations"][0][1] == lines[min(lines)][0]["explanation"]


def _block(page, name):
    found = re.search(rf'id="block-{name}"[^>]*>([^<]+)<', page)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_what_is_there_is_kept_and_other_settings_replace_it(evaluation, explained, capsys):
    path = explained["topk_k10"]
    before = path.read_bytes()
    settings = {"evaluation": str(evaluation), "window": 6, "n_score": 8, "bootstrap_samples": 50}
    explain(ExplainConfig(**settings))
    assert "kept" in capsys.readouterr().err
    assert path.read_bytes() == before
    path.unlink()
    explain(ExplainConfig(**settings))
    assert path.read_bytes() == before
    explain(ExplainConfig(**settings, latents=[3], saes=["topk_k10"]))
    assert set(pq.read_table(path)["latent"].to_pylist()) == {3}
    explain(ExplainConfig(**settings))


def test_an_evaluation_after_it_still_shows_them_until_the_index_changes(evaluation, explained):
    index = FeatureIndex.open(evaluation / "features" / "topk_k10.parquet")
    assert read_explanations(index)
    index.metadata["fingerprint"] = "another"
    assert read_explanations(index) == {}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"saes": ["other"]}, ConfigError, "no feature index of an SAE 'other'"),
        ({"latents": [99]}, ConfigError, "latents 0 to 31, got 99"),
        ({"evaluation": "no/such"}, MissingFileError, "no evaluation in 'no/such'"),
    ],
)
def test_what_is_refused(evaluation, changes, error, said, capsys):
    config = ExplainConfig(**({"evaluation": str(evaluation), "saes": ["topk_k10"]} | changes))
    with pytest.raises(error, match=said):
        explain(config)
    assert run_guarded(lambda: explain(config)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_surroundings_of_tokens_that_split_words():
    texts = ["x", " un", "itt", "est", ".", "(", "'", "a", ")", "\n    ", "pass"]
    found = read_surroundings(np.arange(len(texts)), texts, len(texts))
    words = [found.words[i] if i >= 0 else None for i in found.word]
    assert words == ["x", "un", "unitt", "unittest", None, None, None, "a", None, None, "pass"]
    previous = [found.words[i] if i >= 0 else None for i in found.previous_word]
    assert previous == [None, "x", "x", "x", "unittest", "unittest", "unittest", "unittest", "a", "a", "a"]
    inside = [found.enclosures[i] if i >= 0 else None for i in found.inside]
    assert inside == [None] * 6 + ["(", "'", "'", "'", "("]
    assert found.indentation.tolist() == [-1] * 9 + [4, 4]
