"""Steer and attribute with SAELens's HookedSAETransformer; run by the peers' interpreter.

usage: saelens_steering.py MODEL_FOLDER SAE_FOLDER TOKENS.npy LATENT OUTPUT.npz
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE, HookedSAETransformer

sys.path.append(str(Path(__file__).parents[2]))
from hooked_gpt2 import hooked_gpt2

folder, sae_folder, tokens, latent, output = sys.argv[1:]
model = hooked_gpt2(HookedSAETransformer, folder)
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
