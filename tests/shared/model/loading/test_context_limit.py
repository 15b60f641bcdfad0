"""The limit of a model's context is the number of tokens at which its forward pass still works."""

from __future__ import annotations

import pytest
import torch
import transformers as tr

from thresher.shared.model.loading.context_limit import context_limit

N = 12
SHAPE = dict(vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
TEXT = SHAPE | dict(max_position_embeddings=N, bos_token_id=0, eos_token_id=2)
DECODER = dict(vocab_size=37, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24)
GPT = dict(vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=N, bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (tr.RobertaModel, tr.RobertaConfig(**TEXT, pad_token_id=1), N - 2),
        (tr.RobertaForCausalLM, tr.RobertaConfig(**TEXT, pad_token_id=1, is_decoder=True), N - 2),
        (tr.RobertaModel, tr.RobertaConfig(**TEXT, pad_token_id=3), N - 4),
        (tr.XLMRobertaModel, tr.XLMRobertaConfig(**TEXT, pad_token_id=1), N - 2),
        (tr.XLMRobertaXLModel, tr.XLMRobertaXLConfig(**TEXT, pad_token_id=1), N - 2),
        (tr.CamembertModel, tr.CamembertConfig(**TEXT, pad_token_id=1), N - 2),
        (tr.RobertaPreLayerNormModel, tr.RobertaPreLayerNormConfig(**TEXT, pad_token_id=1), N - 2),
        (tr.Data2VecTextModel, tr.Data2VecTextConfig(**TEXT, pad_token_id=1), N - 2),
        (tr.MPNetModel, tr.MPNetConfig(**TEXT, pad_token_id=1), N - 2),
        (tr.EsmModel, tr.EsmConfig(**TEXT, pad_token_id=1, position_embedding_type="absolute"), N - 2),
        (tr.IBertModel, tr.IBertConfig(**TEXT, pad_token_id=1), N - 2),
        (tr.BertModel, tr.BertConfig(**TEXT, pad_token_id=1), N),
        (tr.AlbertModel, tr.AlbertConfig(**TEXT, embedding_size=8), N),
        (tr.DebertaV2Model, tr.DebertaV2Config(**TEXT), N),
        (tr.NystromformerModel, tr.NystromformerConfig(**TEXT), N),
        (tr.OPTForCausalLM, tr.OPTConfig(**TEXT, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=1), N),
        (tr.BartForCausalLM, tr.BartConfig(**DECODER, max_position_embeddings=N), N),
        (tr.BioGptForCausalLM, tr.BioGptConfig(**TEXT, pad_token_id=1), N),
        (tr.GPT2LMHeadModel, tr.GPT2Config(**GPT), N),
        (tr.OpenAIGPTLMHeadModel, tr.OpenAIGPTConfig(**GPT), N),
        (tr.GPTJForCausalLM, tr.GPTJConfig(**GPT, rotary_dim=4), N),
        (tr.CTRLLMHeadModel, tr.CTRLConfig(vocab_size=37, n_positions=N, n_embd=16, dff=24, n_layer=1, n_head=2), N),
        (tr.MptForCausalLM, tr.MptConfig(vocab_size=37, d_model=16, n_heads=2, n_layers=1, max_seq_len=N), N),
    ],
)  # fmt: skip
def test_the_limit_is_where_the_forward_pass_ends(model, config, expected):
    built = model(config).eval()
    assert context_limit(built) == expected
    with torch.no_grad():
        built(input_ids=torch.full((1, expected), 5))
        with pytest.raises((IndexError, RuntimeError)):
            built(input_ids=torch.full((1, expected + 1), 5))


def test_a_model_that_counts_no_positions_has_no_limit():
    bloom = tr.BloomForCausalLM(tr.BloomConfig(vocab_size=37, hidden_size=16, n_layer=1, n_head=2))
    assert context_limit(bloom) is None


def test_the_limit_of_rotary_models_is_the_configuration_s():
    assert context_limit(tr.LlamaForCausalLM(tr.LlamaConfig(**TEXT))) == N
    vision = SHAPE | dict(image_size=16, patch_size=8)
    llava = tr.LlavaConfig(text_config=tr.LlamaConfig(**TEXT), vision_config=tr.CLIPVisionConfig(**vision))
    assert context_limit(tr.LlavaForConditionalGeneration(llava)) == N
