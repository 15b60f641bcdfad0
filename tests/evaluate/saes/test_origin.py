"""An SAE of another model is refused, a possible mismatch is noted, and spellings of one model are equal."""

from __future__ import annotations

import json

import pytest

from thresher.evaluate.command import main
from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.evaluate.saes.names import LONGEST, file_names, printable
from thresher.evaluate.saes.origin import model_relation
from thresher.shared.store import ActivationStore


@pytest.mark.parametrize(
    ("a", "b", "relation"),
    [
        ("gpt2", "openai-community/gpt2", "same"),
        ("gpt2", "/data/models/gpt2", "same"),
        ("pythia-70m", "EleutherAI/Pythia_70M", "same"),
        ("gpt2-small", "openai-community/gpt2", "same"),
        ("pythia-70m", "EleutherAI/pythia-70m-deduped", "perhaps"),
        ("google/gemma-2-2b", "google/gemma-2-2b-it", "perhaps"),
        ("gpt2", "/data/models/mine", "perhaps"),
        ("gpt2", "EleutherAI/pythia-160m", "other"),
        ("google/gemma-2b", "google/gemma-2-2b", "other"),
    ],
)
def test_names_of_models(a, b, relation):
    assert model_relation(a, b) == model_relation(b, a) == relation


@pytest.fixture
def judged(tiny, make_sae, tmp_path, monkeypatch, capsys):
    """The function that evaluates an SAE with given metadata on a store with given metadata."""

    def judge(said, stored, *more):
        sae = make_sae()
        sae.metadata |= said
        sae.save(tmp_path / "sae")
        opened = ActivationStore.open(tiny.store)
        opened.metadata.update(stored)
        monkeypatch.setattr("thresher.evaluate.prepare.ActivationStore.open", lambda *_, **__: opened)
        options = ["--store", tiny.store, "--saes", tmp_path / "sae", "--output", tmp_path / "out", "--model", "false"]
        code = main([str(option) for option in (*options, "--feature_rows", 0, "--bootstrap_samples", 0, *more)])
        return code, capsys.readouterr()

    return judge


def test_an_sae_of_another_model_is_refused(judged, tmp_path):
    code, told = judged({"model_name": "gpt2"}, {"model": "EleutherAI/pythia-160m"})
    assert code == 2
    assert "was trained on 'gpt2', another model than the store's 'EleutherAI/pythia-160m'" in told.err
    assert "allow_other_model = true" in told.err
    assert told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_sae_of_another_model_is_evaluated_if_that_is_asked_for(judged, tmp_path):
    code, told = judged({"model_name": "gpt2"}, {"model": "EleutherAI/pythia-160m"}, "--allow_other_model", "true")
    assert code == 0
    assert "note: SAE 'sae' was trained on 'gpt2', another model" in told.err
    assert "another model" in (tmp_path / "out" / "report.html").read_text()


def test_weights_decide_where_both_are_known(judged):
    def stored(digest):
        return {"model": "m", "harvest": {"content": {"weights": f"2 files, 9 bytes, blake2b {digest}"}}}

    said = {"model_name": "m", "model_content": "2 files, 9 bytes, blake2b aa"}
    assert judged(said, stored("aa"))[0] == 0
    code, told = judged(said, stored("bb"))
    assert code == 2
    assert "a model 'm' whose files are not those of the store's 'm'" in told.err
    code, told = judged(said | {"model_name": "elsewhere/name"}, stored("aa"))
    assert (code, "note" in told.err) == (0, False)


def test_training_says_what_it_was_trained_on(tiny, tmp_path):
    from thresher.train.run_state import _sae_metadata

    store = ActivationStore.open(tiny.store)
    files, adapter = "2 files, 9 bytes, blake2b aa", "1 file, 3 bytes, blake2b bb"
    store.metadata["harvest"] = {"content": {"weights": files, "adapter": adapter, "tokenizer": "3 files"}}
    assert _sae_metadata(store)["model_content"] == f"{files} with adapter {adapter}"
    del store.metadata["harvest"]
    assert _sae_metadata(store)["model_content"] is None


def test_other_differences_are_noted(judged, tmp_path):
    code, told = judged(
        {"model_name": "gpt2", "dataset_path": "org/c4", "context_size": 1024},
        {"model": "openai-community/gpt2", "dataset": "org/pile"},
    )
    assert code == 0
    notes = [
        "was trained on text of 'org/c4', and the store contains 'org/pile'",
        "was trained on contexts of 1,024 tokens, and the store's have 12",
    ]
    assert all(f"note: SAE 'sae' {note}" in told.err for note in notes)
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert row["notes"] == notes


def test_what_training_writes_is_compared(tiny, sweep, tmp_path):
    rows = evaluate(EvaluateConfig(store=str(tiny.store), saes=str(sweep), output=str(tmp_path), feature_rows=0))
    assert all("notes" not in row for row in rows)


def test_files_of_names():
    long = "x" * 300
    names = ["run_1/sae", "run/1_sae", "a", "b/A", "B_a", long]
    files = file_names(names)
    assert files["a"] == "a"
    assert len({file.casefold() for file in files.values()}) == len(names)
    assert all("/" not in file and len(file.encode()) <= LONGEST for file in files.values())
    assert file_names(reversed(names)) == files
    assert file_names(["run_1/sae"]) == {"run_1/sae": "run_1_sae"}


def test_names_that_can_be_printed():
    assert printable("k=32 caf\u00e9 \u4e2d") == "k=32 caf\u00e9 \u4e2d"
    assert printable(b"caf\xe9\n".decode("utf-8", "surrogateescape")) == r"caf\xe9\n"
    assert printable(r"caf\xe9\n") == r"caf\\xe9\\n"
