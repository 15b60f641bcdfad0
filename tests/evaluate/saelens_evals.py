"""Run SAELens's own `evals.py` on given SAEs, tokens and mask; run by the peers' interpreter.

usage: saelens_evals.py MODEL_FOLDER TOKENS.npy MASKED_TOKEN OUTPUT.json SAE_FOLDER...
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer

sys.path.append(str(Path(__file__).parents[1]))
from hooked_gpt2 import hooked_gpt2


class StoredTokens:
    """What `run_evals` asks of an activations store, over tokens in memory."""

    def __init__(self, tokens):
        self.tokens = torch.from_numpy(tokens)
        self.context_size = tokens.shape[1]
        self.store_batch_size_prompts = len(tokens)
        self.next = 0

    def get_batch_tokens(self, n):
        batch = self.tokens[self.next : self.next + n]
        self.next += n
        return batch

    def reset_input_dataset(self):
        self.next = 0


def main(model_folder, tokens_file, masked, output, *folders):
    """Evaluate every SAE on all tokens, in one batch and in batches of two contexts."""
    torch.set_grad_enabled(False)
    model = hooked_gpt2(HookedTransformer, model_folder)
    tokens = np.load(tokens_file)
    results = {}
    for folder in folders:
        sae = SAE.load_from_disk(folder)
        results[folder] = {}
        for size in (len(tokens), 2):
            batches = len(tokens) // size
            config = get_eval_everything_config(size, batches, batches)
            metrics, latents = run_evals(
                sae, StoredTokens(tokens), model, ActivationScaler(), config, exclude_special_tokens=[int(masked)]
            )
            flat = {name: value for group in metrics.values() for name, value in group.items()}
            results[folder]["whole" if size == len(tokens) else "batches"] = flat | latents
    with open(output, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
