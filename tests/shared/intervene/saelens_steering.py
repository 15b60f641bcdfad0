"""Steer and attribute with SAELens's HookedSAETransformer; run by the peers' interpreter.

usage: saelens_steering.py MODEL_FOLDER SAE_FOLDER TOKENS.npy LATENT OUTPUT.npz
"""

import sys

import numpy as np
import torch
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel

folder, sae_folder, tokens, latent, output = sys.argv[1:]
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
model = HookedSAETransformer(config)
plain = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
model.load_and_process_state_dict(convert_gpt2_weights(source, config), **plain)
model.eval()
sae = SAE.load_from_disk(sae_folder)
sae.use_error_term = True
model.add_sae(sae)
tokens, latent = torch.from_numpy(np.load(tokens)), int(latent)
name = f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"
kept = {}


def clamp(acts, hook):
    acts = acts.clone()
    acts[:, :, latent] = 5.0
    return acts


def keep(acts, hook):
    kept["acts"] = acts.detach().requires_grad_()
    return kept["acts"]


steered = model.run_with_hooks(tokens, fwd_hooks=[(name, clamp)])
clean = model.run_with_hooks(tokens, fwd_hooks=[(name, keep)])
(clean[:, -1, 3] - clean[:, -1, 5]).sum().backward()
scores = kept["acts"].grad * kept["acts"]
np.savez(output, steered=steered.detach().numpy(), clean=clean.detach().numpy(), scores=scores.detach().numpy())
