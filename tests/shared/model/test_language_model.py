"""Loading models and tokenizers: decoders with a head, encoders bare, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

from thresher.shared.core.errors import ConfigError, ModelError
from thresher.shared.model import language_model
from thresher.shared.model.language_model import load_model, load_tokenizer, model_dtype

BERT = BertConfig(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=20,
)  # fmt: skip


def test_a_decoder_loads_with_its_head_ready_for_inference(tmp_path):
    GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=20, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "bfloat16")
    assert isinstance(model, GPT2LMHeadModel)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert load_model(str(tmp_path), "float32").dtype == torch.float32


def test_encoders_load_bare(tmp_path):
    torch.manual_seed(0)
    whole = BertForMaskedLM(BERT).eval()
    whole.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "float32")
    assert isinstance(model, BertModel)
    input_ids = torch.arange(10).reshape(2, 5)
    expected = whole(input_ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model(input_ids).last_hidden_state, expected)


def test_auto_is_bfloat16_where_the_device_has_it(monkeypatch):
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(language_model, "has_fast_bfloat16", lambda _, fast=fast: fast)
        assert model_dtype("auto", "cpu") == expected
    assert model_dtype("float16", "cpu") == torch.float16
    with pytest.raises(ModelError, match="expected model dtype auto, bfloat16"):
        model_dtype("int4", "cpu")


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ModelError, match="no model '"):
            load_model(str(path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="cannot load model '"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no CUDA device; use device = 'cpu'"):
        load_model(str(tmp_path), device="cuda")
