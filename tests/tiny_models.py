"""One tiny model with random weights for each causal class of transformers.

`build(model_type)` makes the configuration of a model type as small as its code allows and draws weights of a size at
which every part of a block adds something to the residual stream that can be told from the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, WIDTH, LAYERS, HEADS = 64, 32, 4, 4

_SIZES: dict[str, Any] = {
    name: value
    for names, value in (
        ("vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCABULARY),
        ("hidden_size n_embd d_model embedding_size word_embed_proj_dim lru_width cross_attention_hidden_size", WIDTH),
        ("num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers", LAYERS),
        ("num_encoder_layers", LAYERS),
        ("num_attention_heads n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads", HEADS),
        ("encoder_attention_heads num_encoder_attention_heads index_n_heads linear_num_value_heads", HEADS),
        ("swa_num_attention_heads linear_num_heads", HEADS),
        ("num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads", 2),
        ("head_dim swa_head_dim index_head_dim v_head_dim qk_nope_head_dim linear_key_head_dim", 8),
        ("linear_value_head_dim linear_head_dim dim_head", 8),
        ("qk_rope_head_dim", 8),
        ("rotary_dim", 4),
        ("qk_head_dim", 16),
        ("kv_lora_rank q_lora_rank o_lora_rank hc_lowrank gated_norm_rank laurel_rank", 16),
        ("intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_hidden_size", 48),
        ("moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size", 24),
        ("moe_shared_expert_intermediate_size shared_intermediate_size dense_intermediate_size", 24),
        ("shared_experts_intermediate_size intermediate_size_mlp", 24),
        ("num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num", 4),
        ("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts", 2),
        ("n_group topk_group num_expert_group", 1),
        ("max_position_embeddings n_positions n_ctx max_seq_len model_max_length", 64),
        ("sliding_window sliding_window_size attention_window_size window_size local_attention", 16),
        ("pad_token_id bos_token_id eos_token_id", 0),
        ("hidden_size_per_layer_input ple_embed_dim", 8),
        ("mamba_d_state state_size ssm_state_size", 8),
        ("mamba_n_heads mamba_num_heads", 8),
        ("mamba_d_head mamba_head_dim", 8),
        ("mamba_chunk_size chunk_size", 8),
        ("n_groups mamba_n_groups", 1),
        ("time_step_rank mamba_dt_rank", 4),
        ("index_topk index_topk_blocks", 4),
    )
    for name in names.split()
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_LATENT = {"num_key_value_heads": HEADS}  # attention over a compressed cache has no grouped heads
_GRANITE = {"residual_multiplier": 0.22}
_HEADS = {"head_dim": 8}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"), _GRANITE),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _HYBRID),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEADS),
    "bailing_hybrid": _LATENT | {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _GRANITE | {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _HYBRID | _LATENT,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
COMPOSITE = [
    "blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
    "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize", "musicgen",
    "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
]  # fmt: skip
"""Types whose configuration holds others' (of images, sound or a second model): each has a text type of its own."""
NOT_SMALL = ["cohere_compass_text", "dots3_note_text", "qwen4_exp_text", "xlstm", "zamba", "zamba2"]
"""Types whose configuration does not get small by changing sizes alone."""
TESTED = tuple(model_type for model_type in MODEL_TYPES if model_type not in (*COMPOSITE, *NOT_SMALL))


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """Return a model type's configuration with every size that it has made small, and then `changes`."""
    cls = CONFIG_MAPPING[model_type]
    own = _OWN.get(model_type, {}) | changes
    try:
        default = cls()
    except Exception:
        default = cls(**own)
    known = vars(default) | {ours: getattr(default, ours, None) for ours in cls.attribute_map}
    sizes = {name: value for name, value in _SIZES.items() if known.get(name) is not None or name in own}
    return cls(**sizes | own)


def build(model_type: str, seed: int = 0, drawn: bool = True, **changes: Any) -> nn.Module:
    """Return a causal language model of this type, ready for inference.

    Its weights are those of `spread`, or the library's own for untrained models where they are not `drawn`.
    """
    config = tiny_config(model_type, **changes)
    torch.manual_seed(seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    return spread(model, seed) if drawn else model.eval().requires_grad_(False)


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the weights anew: matrices so that no part of a block vanishes, vectors so that no norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2, generator=generator)
                else:
                    parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval().requires_grad_(False)
