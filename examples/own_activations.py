"""Store activations of your own, and train an SAE on them.

    python examples/own_activations.py [OUTPUT]

The rows here come from a forward pass written by hand with transformers: the output of the GELU in a block's MLP,
four times as wide as the residual stream. Rows from vLLM, nnsight or a vision model are written in the same way.
Takes a few seconds on a CPU and needs no network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from thresher import ActivationStore, ActivationStoreWriter, Sae, TrainConfig, train

MODEL = Path(__file__).parents[1] / "models" / "stdlib-lm"
CONTEXT_SIZE = 128


@torch.no_grad()
def activations(start: int, stop: int) -> Iterator[Tensor]:
    """Yield `[8, CONTEXT_SIZE, 1024]` for contexts [start, stop): what block 1's GELU returns on some Python source."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    source = "".join(Path(module.__file__).read_text() for module in (json, json.decoder, json.encoder))
    tokens = tokenizer(source, return_tensors="pt", verbose=False)["input_ids"][0].repeat(8)
    contexts = tokens[: stop * CONTEXT_SIZE].view(stop, CONTEXT_SIZE)
    kept: list[Tensor] = []
    model.transformer.h[1].mlp.act.register_forward_hook(lambda module, inputs, output: kept.append(output))
    for first in range(start, stop, 8):
        model(contexts[first : first + 8])
        yield kept.pop()


def main(output: Path, n_contexts: int = 128) -> Sae:
    # A writer takes batches [contexts, positions, d_in] of torch or NumPy. If the process is killed, the same code
    # resumes at n_committed_contexts. Held-out contexts are for evaluation and are never trained on.
    with ActivationStoreWriter(output / "store", {"gelu": 1024}, context_size=CONTEXT_SIZE) as writer:
        for batch in activations(writer.n_committed_contexts, n_contexts):
            numbers = range(writer.n_contexts, writer.n_contexts + len(batch))
            writer.append({"gelu": batch}, held_out=[number % 16 == 0 for number in numbers])

    config = TrainConfig(
        store=str(output / "store"),
        output=str(output / "saes"),
        sae=[{"architecture": "topk", "hook_point": "gelu", "d_sae": 2048, "k": 16, "lr": 3e-3, "name": "topk"}],
        batch_size=512,
        epochs=4,
        warmup_steps=10,
        device="cpu",
    )
    (folder,) = train(config)

    # The SAE takes and returns raw activations: normalisation is folded into its weights.
    sae = Sae.load(folder)
    store = ActivationStore.open(output / "store")
    x = store.read("gelu", 0, CONTEXT_SIZE).float()  # context 0 is held out
    latents = sae.encode(x)
    error = (sae.decode(latents) - x).square().sum() / (x - x.mean(0)).square().sum()
    print(f"{(latents != 0).sum(-1).float().mean():.0f} active latents per row, explained variance {1 - error:.3f}")
    return sae


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/own_activations"))
