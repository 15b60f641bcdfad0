"""Which model is spliced into, and that one which does not fit is refused before any work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from thresher.evaluate import store_model
from thresher.evaluate.command import main
from thresher.evaluate.config import EvaluateConfig
from thresher.shared.errors import ModelError


@pytest.fixture
def loaded(monkeypatch):
    """What is asked of the loaders of models and tokenizers, instead of loading any."""
    seen = []
    fake = SimpleNamespace(config=SimpleNamespace())
    monkeypatch.setattr(store_model, "load_model", lambda *given, **options: seen.append((*given, options)) or fake)
    monkeypatch.setattr(store_model, "load_tokenizer", lambda *given, **options: seen.append((*given, options)) or fake)
    monkeypatch.setattr(store_model, "is_encoder", lambda config: False)
    return seen


def config_of(model=None, **settings):
    return EvaluateConfig(store="s", saes="a", output="o", model=model, **settings)


def test_the_stores_own_model_is_loaded_as_it_was_harvested(loaded):
    harvest = {"revision": "step3000", "attn_implementation": "eager"}
    metadata = {"model": "lab/m", "model_dtype": "float16", "tokenizer": "lab/t", "harvest": harvest}
    store = SimpleNamespace(metadata=metadata, has_tokens=True)
    store_model.open_model(config_of(), store, "cpu")
    store_model.open_model(config_of("lab/other", attn_implementation="sdpa", trust_remote_code=True), store, "cpu")
    store_model.open_tokenizer(config_of(), store)
    options = {"adapter": None, "trust_remote_code": False, "attn_implementation": "eager"}
    other = {"adapter": None, "trust_remote_code": True, "attn_implementation": "sdpa"}
    assert loaded == [
        ("lab/m", "float16", "cpu", "step3000", options),
        ("lab/other", "float16", "cpu", None, other),
        ("lab/t", "step3000", {"trust_remote_code": False}),
    ]


def test_the_adapter_of_the_harvest_is_never_dropped_in_silence(loaded):
    metadata = {"model": "lab/m", "harvest": {"adapter": "lab/lora"}}
    store = SimpleNamespace(metadata=metadata, has_tokens=True, path="s")
    for config in (config_of(), config_of("lab/m"), config_of(adapter="b"), config_of("c", adapter=False)):
        store_model.open_model(config, store, "cpu")
    assert [options["adapter"] for *_, options in loaded] == ["lab/lora", "lab/lora", "b", None]
    with pytest.raises(ModelError, match="harvested with the adapter 'lab/lora'; say whether 'c'"):
        store_model.open_model(config_of("c"), store, "cpu")


def test_a_model_of_another_width_is_refused(tiny, sweep, tmp_path, capsys):
    GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path / "narrow")
    capsys.readouterr()  # what saving it says
    arguments = ["--store", tiny.store, "--saes", sweep, "--output", tmp_path / "out", "--model", tmp_path / "narrow"]
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "expected a model of width 16" in error
    assert "got GPT2LMHeadModel of width 8" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
