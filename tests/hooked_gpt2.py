"""A Hugging Face GPT-2 in TransformerLens, for scripts that the peers' interpreter runs."""

import torch
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel


def hooked_gpt2(kind, folder):
    """Return a model of TransformerLens's class `kind` with a Hugging Face GPT-2's weights, unprocessed."""
    source = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    hf = source.config
    config = HookedTransformerConfig(
        n_layers=hf.n_layer,
        d_model=hf.n_embd,
        n_ctx=hf.n_positions,
        d_head=hf.n_embd // hf.n_head,
        n_heads=hf.n_head,
        d_mlp=4 * hf.n_embd,
        d_vocab=hf.vocab_size,
        act_fn="gelu_new",
        eps=hf.layer_norm_epsilon,
        normalization_type="LN",
        model_name="gpt2",
        seed=0,
    )
    model = kind(config)
    plain = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(convert_gpt2_weights(source, config), **plain)
    return model.eval()
