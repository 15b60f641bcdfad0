"""Weights that are not those of the configuration are refused by name; heads that are not loaded are no fault."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from thresher.shared.core.errors import ModelError
from thresher.shared.model.language_model import is_encoder, load_model

from ....tiny_models import TESTED, build

SHAPE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
TEXT = SHAPE | dict(vocab_size=37, max_position_embeddings=20, pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = SHAPE | dict(image_size=16, patch_size=8)


def llama(**more):
    return tr.LlamaConfig(**TEXT, **more)


def gpt2():
    return tr.GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=20, bos_token_id=0, eos_token_id=0)


def edit(folder, change):
    """Rewrite the weights of a saved model."""
    path = folder / "model.safetensors"
    save_file({key: value.clone() for key, value in change(load_file(path)).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: tr.BertModel(tr.BertConfig(**TEXT)), id="bert"),
        pytest.param(lambda: tr.LlamaModel(llama()), id="a decoder without its head"),
        pytest.param(lambda: tr.GPT2Model(gpt2()), id="a decoder whose head is its embeddings"),
        pytest.param(lambda: tr.BertModel(tr.BertConfig(**TEXT), add_pooling_layer=False), id="bert without pooler"),
        pytest.param(lambda: tr.BertForMaskedLM(tr.BertConfig(**TEXT)), id="bert mlm"),
        pytest.param(lambda: tr.BertForPreTraining(tr.BertConfig(**TEXT)), id="bert pre-training"),
        pytest.param(lambda: tr.BertForSequenceClassification(tr.BertConfig(**TEXT)), id="bert classifier"),
        pytest.param(lambda: tr.AlbertForMaskedLM(tr.AlbertConfig(**TEXT, embedding_size=8)), id="albert"),
        pytest.param(lambda: tr.RobertaForMaskedLM(tr.RobertaConfig(**TEXT)), id="roberta"),
        pytest.param(lambda: tr.ElectraForPreTraining(tr.ElectraConfig(**TEXT, embedding_size=8)), id="electra"),
        pytest.param(lambda: tr.DebertaV2ForMaskedLM(tr.DebertaV2Config(**TEXT)), id="deberta"),
        pytest.param(
            lambda: tr.ModernBertForMaskedLM(tr.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)),
            id="modernbert",
        ),
        pytest.param(lambda: tr.LlamaForCausalLM(llama()), id="llama"),
        pytest.param(lambda: tr.LlamaForCausalLM(llama(tie_word_embeddings=True)), id="llama tied"),
        pytest.param(lambda: tr.LlamaModel(llama(tie_word_embeddings=True)), id="llama tied, saved bare"),
        pytest.param(lambda: tr.GPT2LMHeadModel(gpt2()), id="gpt2"),
        pytest.param(
            lambda: tr.LlavaForConditionalGeneration(
                tr.LlavaConfig(text_config=llama(), vision_config=tr.CLIPVisionConfig(**VISION))
            ),
            id="llava",
        ),
        pytest.param(
            lambda: tr.Gemma3ForConditionalGeneration(
                tr.Gemma3Config(
                    text_config=TEXT | dict(num_key_value_heads=1, head_dim=8),
                    vision_config=VISION,
                    mm_tokens_per_image=4,
                )
            ),
            id="gemma3",
        ),
    ],
)
def test_what_a_library_saved_is_loaded(model, tmp_path):
    torch.manual_seed(0)
    saved = model().eval()
    saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "float32")
    tokens = torch.tensor([[5, 6, 7, 8]])
    theirs = saved(tokens, output_hidden_states=True).hidden_states[-1]
    ours = loaded(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours, theirs)


def test_a_decoder_without_its_head_predicts_no_token(tmp_path):
    """Evaluation asks `is_encoder` whether there are losses to measure."""
    for model, has_head in (
        (tr.LlamaModel(llama()), False),
        (tr.LlamaForCausalLM(llama()), True),
        (tr.GPT2Model(gpt2()), True),
    ):
        model.save_pretrained(tmp_path / type(model).__name__)
        loaded = load_model(str(tmp_path / type(model).__name__), "float32")
        assert is_encoder(loaded.config) is not has_head
        assert (loaded.get_output_embeddings() is not None) is has_head


@pytest.mark.parametrize(
    "left_over",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.masked_bias", "v_head.summary.weight",
     "mtp.layers.0.proj.weight"],
)  # fmt: skip
def test_unused_keys_of_old_checkpoints_are_ignored(left_over, tmp_path):
    tr.LlamaForCausalLM(llama()).save_pretrained(tmp_path)
    edit(tmp_path, lambda weights: weights | {left_over: torch.zeros(3)})
    load_model(str(tmp_path), "float32")


def test_pythia_s_buffers_are_passed_over(tmp_path):
    tr.GPTNeoXForCausalLM(tr.GPTNeoXConfig(**TEXT)).save_pretrained(tmp_path)
    layer = "gpt_neox.layers.0.attention"
    buffers = {f"{layer}.{key}": torch.zeros(2) for key in ("bias", "masked_bias", "rotary_emb.inv_freq")}
    edit(tmp_path, lambda weights: weights | buffers)
    load_model(str(tmp_path), "float32")


@pytest.mark.parametrize(
    ("model", "change", "told"),
    [
        pytest.param(
            lambda: tr.LlamaForCausalLM(llama()),
            lambda weights: {f"module.{key}": value for key, value in weights.items()},
            r"21 missing: lm_head\.weight, .* and 18 more; 21 not in the model: module\.lm_head",
            id="saved by DataParallel",
        ),
        pytest.param(
            lambda: tr.BertModel(tr.BertConfig(**TEXT)),
            lambda weights: {f"module.{key}": value for key, value in weights.items()},
            r"37 missing: embeddings\.",
            id="an encoder saved by DataParallel",
        ),
        pytest.param(
            lambda: tr.LlamaForCausalLM(llama()),
            lambda weights: {key: value for key, value in weights.items() if "layers.1.mlp.up" not in key},
            r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight\.",
            id="one weight less",
        ),
        pytest.param(
            lambda: tr.LlamaForCausalLM(llama()),
            lambda weights: weights | {"model.layers.1.mlp.gate.bias": torch.zeros(4)},
            r"1 not in the model: model\.layers\.1\.mlp\.gate\.bias\.",
            id="one weight more",
        ),
        pytest.param(
            lambda: tr.BertForMaskedLM(tr.BertConfig(**TEXT)),
            lambda weights: weights | {"bert.encoder.layer.0.adapters.a.weight": torch.zeros(4)},
            r"1 not in the model: (bert\.)?encoder\.layer\.0\.adapters\.a\.weight\.",
            id="one weight more in an encoder",
        ),
        pytest.param(
            lambda: tr.LlamaForSequenceClassification(llama()), dict, r"1 missing: lm_head\.weight\.", id="a classifier"
        ),
    ],
)
def test_weights_that_do_not_match_are_refused(model, change, told, tmp_path, capfd):
    model().save_pretrained(tmp_path)
    capfd.readouterr()
    edit(tmp_path, change)
    with pytest.raises(ModelError, match=told):
        load_model(str(tmp_path), "float32")
    assert capfd.readouterr() == ("", "")  # the error alone, no report by transformers


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"intermediate_size": 32}, r"6 with another .*0\.mlp\.down_proj\.weight \(\[16, 24\], expected \[16, 32\]\)"),
        ({"num_hidden_layers": 1}, r"9 not in the model: model\.layers\.1\.input_layernorm\.weight"),
        ({"num_hidden_layers": 3}, r"9 missing: model\.layers\.2\.input_layernorm\.weight"),
        ({"vocab_size": 40}, r"2 with another shape .*lm_head\.weight \(\[37, 16\], expected \[40, 16\]\)"),
        ({"attention_bias": True}, r"8 missing: model\.layers\.0\.self_attn\.k_proj\.bias"),
    ],
)  # fmt: skip
def test_a_configuration_of_another_model_is_refused(changes, told, tmp_path):
    tr.LlamaForCausalLM(llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=told):
        load_model(str(tmp_path), "float32")


@pytest.mark.long
@pytest.mark.parametrize("model_type", TESTED)
def test_every_causal_class_loads_as_it_was_saved(model_type, tmp_path):
    saved = build(model_type)
    saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "float32")
    tokens = torch.tensor([[5, 6, 7, 8]])
    ours, theirs = (model.base_model(input_ids=tokens, use_cache=False)[0] for model in (loaded, saved))
    torch.testing.assert_close(ours, theirs)
