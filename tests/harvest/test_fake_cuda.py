"""A harvest's forward passes on tensors that claim to be on a GPU: the model runs there, and the host gets copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from thresher.harvest.model.forward import choose_workers, forward_passes
from thresher.harvest.model.plan import HarvestPlan
from thresher.harvest.tokens.packing import ContextBatch
from thresher.shared.model.language_model import resolve_hook_points

from ..fake_cuda import fake_cuda, to_gpu

D, CONTEXT = 16, 8
NAMES = ["blocks.0.mlp_out", "blocks.1.resid_pre", "blocks.1.resid_post"]
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=D, n_head=2, n_positions=CONTEXT, vocab_size=50, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=D,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=50,
            max_position_embeddings=CONTEXT,
        )
    ),
}


def batches():
    for n in (3, 3, 1):
        tokens = np.zeros((n, CONTEXT), np.int32)
        yield ContextBatch(tokens, tokens.astype(np.int64), tokens, np.zeros(n, bool), {})


@pytest.mark.parametrize("name", MODELS)
def test_the_gpu_s_activations_reach_the_host(name):
    model = MODELS[name]().eval()
    hook_points = resolve_hook_points(model, NAMES)
    with fake_cuda():
        to_gpu(model)
        assert choose_workers(4, model.device) == 1
        found = list(forward_passes(HarvestPlan(model, None, hook_points, 1), batches(), 1, torch.bfloat16))
    assert [harvested.activations[NAMES[0]].shape for harvested in found] == [(n, CONTEXT, D) for n in (3, 3, 1)]
    assert {str(x.device) for harvested in found for x in harvested.activations.values()} == {"cpu"}
    assert {x.dtype for harvested in found for x in harvested.activations.values()} == {torch.bfloat16}
