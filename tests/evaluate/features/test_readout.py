"""Logit effects against each family's own formula in float64, and the reason if there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from thresher.evaluate.features.logits import logit_effects, readout_of, why_no_effects
from thresher.evaluate.features.readout import Readout, find_readout

D, VOCABULARY = 16, 60
SMALL = {
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
VISION = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
OPT = {key: value for key, value in SMALL.items() if key != "intermediate_size"} | {"ffn_dim": 32}


def rms(model, x, norm, offset):
    return x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * (offset + norm.weight.double())


def layer_norm(model, x, norm):
    x = x - x.mean(dim=1, keepdim=True)
    return x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()


# family -> configuration class, its settings, the path that the readout must give, and the effects by hand
FAMILIES = {
    "gpt2": ("GPT2", SMALL, "transformer.ln_f (LayerNorm)", lambda m, x: layer_norm(m, x, m.transformer.ln_f)),
    "llama": ("Llama", GROUPED, "model.norm (LlamaRMSNorm)", lambda m, x: rms(m, x, m.model.norm, 0)),
    "xglm": ("XGLM", OPT, "model.layer_norm (LayerNorm)", lambda m, x: layer_norm(m, x, m.model.layer_norm)),
    "opt": (
        "OPT",
        OPT | {"word_embed_proj_dim": D},
        "model.decoder.final_layer_norm (LayerNorm)",
        lambda m, x: layer_norm(m, x, m.model.decoder.final_layer_norm),
    ),
    "opt-350m": (
        "OPT",
        OPT | {"word_embed_proj_dim": 8, "do_layer_norm_before": False},
        "the model has no final norm",
        lambda m, x: x @ m.model.decoder.project_out.weight.double().T,
    ),
    "cohere": (
        "Cohere",
        GROUPED | {"logit_scale": 0.0625},
        "times 0.0625",
        lambda m, x: 0.0625 * layer_norm(m, x, m.model.norm),
    ),
    "granite": (
        "Granite",
        GROUPED | {"logits_scaling": 8.0},
        "times 0.125",
        lambda m, x: rms(m, x, m.model.norm, 0) / 8,
    ),
    "gemma2": (
        "Gemma2",
        GROUPED | {"final_logit_softcapping": 0.5},
        "keeps the order",
        lambda m, x: rms(m, x, m.model.norm, 1),
    ),
    "gemma3 multimodal": (
        "Gemma3",
        {
            "text_config": GROUPED,
            "vision_config": VISION | {"image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 30,
            "boi_token_index": 31,
            "eoi_token_index": 32,
        },
        "model.language_model.norm (Gemma3RMSNorm)",
        lambda m, x: rms(m, x, m.model.language_model.norm, 1),
    ),
}


def build(kind, settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def llama():
    return build("Llama", GROUPED)


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_are_those_of_the_familys_formula(family):
    kind, settings, path, by_hand = FAMILIES[family]
    model = build(kind, settings)
    rows = torch.randn(7, D)
    found = logit_effects(model, rows, "blocks.0.resid_post", n=4, step=3)
    effects = by_hand(model, rows.double()) @ model.get_output_embeddings().weight.double().T
    effects -= effects.mean(dim=1, keepdim=True)
    order = effects.argsort(dim=1, descending=True)
    np.testing.assert_array_equal(found.promoted, order[:, :4])
    np.testing.assert_array_equal(found.suppressed, order.flip(1)[:, :4])
    np.testing.assert_allclose(found.promoted_effect, effects.gather(1, order[:, :4]), rtol=2e-3, atol=2e-3)
    assert path in find_readout(model).describe()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_path_is_found_at_half_precision(dtype):
    model = build("Mamba", GROUPED | {"state_size": 4}).to(dtype)
    assert find_readout(model).describe() == "backbone.norm_f (MambaRMSNorm), the unembedding"


def test_rows_that_are_no_token_are_left_out(llama):
    rows = torch.randn(5, D)
    tokens = [*range(10), *range(20, 45), 1000]
    found = logit_effects(llama, rows, "blocks.1.mlp_out", n=3, vocabulary=tokens)
    effects = rms(llama, rows.double(), llama.model.norm, 0) @ llama.lm_head.weight.double().T
    kept = torch.tensor(tokens[:-1])
    effects = effects[:, kept] - effects[:, kept].mean(dim=1, keepdim=True)
    order = effects.argsort(dim=1, descending=True)
    np.testing.assert_array_equal(found.promoted, kept[order[:, :3]])
    np.testing.assert_allclose(found.suppressed_effect, effects.gather(1, order.flip(1)[:, :3]), rtol=1e-3)
    np.testing.assert_allclose(found.peak, effects.amax(dim=1) / effects.std(dim=1, correction=0), rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda head: lambda module, args, output: output * torch.arange(VOCABULARY).sub(20).sign(),
            "not the output of",
        ),
        (lambda head: lambda module, args, output: output.roll(1, dims=-1), "not the output of"),
    ],
)
def test_logits_that_are_made_in_another_way_are_noticed(llama, change, reason):
    """Hooks on the whole model simulate a class that changes its logits."""

    def on_model(module, args, kwargs, output):
        output.logits = change(None)(module, args, output.logits)
        return output

    handle = llama.register_forward_hook(on_model, with_kwargs=True)
    readout = readout_of(llama)
    handle.remove()
    assert isinstance(readout, str)
    assert reason in readout
    assert isinstance(readout_of(llama), Readout)


def test_a_change_between_the_norm_and_the_unembedding_is_noticed(llama):
    handle = llama.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * torch.linspace(1, 2, D),))
    readout = readout_of(llama)
    handle.remove()
    assert isinstance(readout, str)
    assert "the unembedding reads neither" in readout
    with torch.no_grad():
        assert logit_effects(llama, torch.randn(3, D), "blocks.0.resid_post") is not None


@pytest.mark.parametrize(
    "target",
    [
        "blocks.0.attn_z",
        "blocks.0.mlp_in",
        "blocks.0.resid_post + blocks.1.resid_post",
        "model.layers.0.self_attn.q_proj",
    ],
)
def test_other_directions_have_no_effects(llama, target):
    assert logit_effects(llama, torch.randn(3, D), target) is None
    assert "not directions of the residual stream" in why_no_effects(find_readout(llama), D, target)


def test_the_output_of_a_block_is_the_residual_stream(llama):
    for target in ("model.layers.1", "layers.1"):
        assert logit_effects(llama, torch.randn(3, D), target) is not None
