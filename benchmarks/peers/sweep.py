"""Train eight TopK SAEs with SAELens's runners on given tokens, one after another or all from one forward pass.

Runs in the peers' environment: `sweep.py separate|multi TOKENS.safetensors OUTPUT --model PATH --hook NAME`. Prints
the runners' seconds, without imports, as JSON; writes each SAE as an inference model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
from safetensors.torch import load_file

sys.modules["torchvision"] = None  # type: ignore[assignment]  # it may be built for another torch

from sae_lens import (  # noqa: E402
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig  # noqa: E402


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("separate", "multi"))
    parser.add_argument("tokens")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--hook", required=True)
    parser.add_argument("--d-in", type=int, required=True)
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--ks", type=int, nargs="+", required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--n-tokens", type=int, required=True)
    parser.add_argument("--autocast", action="store_true")
    options = parser.parse_args()
    tokens = load_file(options.tokens)["tokens"]
    dataset = datasets.Dataset.from_dict({"input_ids": tokens.tolist()})
    n_steps = options.n_tokens // options.batch_size
    shared: dict[str, Any] = {
        "model_name": options.model,
        "model_class_name": "AutoModelForCausalLM",
        "context_size": tokens.shape[1],
        "prepend_bos": False,
        "streaming": False,
        "training_tokens": options.n_tokens,
        "train_batch_size_tokens": options.batch_size,
        "lr": options.lr,
        "lr_warm_up_steps": n_steps // 20,
        "lr_decay_steps": n_steps // 5,
        "lr_end": options.lr / 100,
        "autocast": options.autocast,
        "autocast_lm": options.autocast,
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    saes = {f"k{k}": TopKTrainingSAEConfig(d_in=options.d_in, d_sae=options.d_sae, k=k) for k in options.ks}
    started, cpu = time.perf_counter(), time.process_time()
    if options.kind == "multi":
        config = MultiSAETrainingRunnerConfig(saes=saes, hook_names=options.hook, **shared)
        trained = MultiSAETrainingRunner(config, override_dataset=dataset).run()
    else:
        trained = {}
        for name, sae in saes.items():
            config = LanguageModelSAERunnerConfig(sae=sae, hook_name=options.hook, **shared)
            trained[name] = LanguageModelSAETrainingRunner(config, override_dataset=dataset).run()
    took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    for name, sae in trained.items():
        sae.save_inference_model(options.output / name)
    print(json.dumps(took))


if __name__ == "__main__":
    main()
