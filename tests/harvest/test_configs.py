"""The harvest configurations that come with the project: their hook points exist in their families of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from thresher.harvest.config import HarvestConfig
from thresher.shared.core.config import load_config, read_toml
from thresher.shared.model.capture import capture, resolve_hook_points
from thresher.shared.synthetic.law import is_synthetic

CONFIGS = Path(__file__).parents[2] / "configs" / "harvest"
SMALL = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_attention_heads=2, max_position_embeddings=4096)
GROUPED = SMALL | dict(num_key_value_heads=1, head_dim=16, pad_token_id=0)

# Tiny random models of each configuration's class, with as many layers as the real one.
MODELS = {
    "cross_layer": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=4, n_head=2, n_positions=256)),
    "demo": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=4, n_head=2, n_positions=256)),
    "graph": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=4, n_head=2, n_positions=256)),
    "gpt2-small": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=12, n_head=2)),
    "pythia-70m": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, num_hidden_layers=6)),
    "gemma-2-2b": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, num_hidden_layers=26)),
    "gemma-3-270m": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, num_hidden_layers=18)),
    "smollm2-135m": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, num_hidden_layers=30)),
    "llama-3.1-8b": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, num_hidden_layers=32)),
    "qwen3-0.6b": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, num_hidden_layers=28)),
}


def test_every_configuration_has_a_model_here():
    of_models = {path.stem for path in CONFIGS.glob("*.toml") if not is_synthetic(read_toml(path)["model"])}
    assert of_models == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_hook_points_resolve(name):
    config = load_config(HarvestConfig, CONFIGS / f"{name}.toml", [])
    model = MODELS[name]().eval()
    hook_points = resolve_hook_points(model, config.hook_points)
    assert list(hook_points) == config.hook_points
    activations = capture(model, torch.arange(10).reshape(2, 5), hook_points)
    assert all(activation.shape == (2, 5, 24) for activation in activations.values())
    assert config.context_size <= model.config.max_position_embeddings
    assert config.store == f"runs/{name}/store"
    assert 0 < config.holdout_fraction <= 0.1
