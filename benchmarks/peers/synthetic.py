"""Train one of SAELens's SAEs on given synthetic rows and save it for inference; print the seconds as JSON.

    .venv-peers/bin/python benchmarks/peers/synthetic.py ARCHITECTURE ROWS FOLDER --k 6 --lr 1e-3 --seed 0

The trainer is the one of its `SyntheticSAERunner`, with that runner's settings: rows as they are, Adam (.9, .999), and
no AMP. Only what must be equal is given: rows and their order, batches, latents, k, learning rate, and after how many
steps a latent is dead. JumpReLU's penalty is the one on the distance from an L0, of `--k`. The learning rate is
constant, as it is there by default, unless `--warmup-steps` and `--decay-steps` give it a schedule.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time

import torch
from safetensors.torch import load_file

sys.modules["torchvision"] = None  # type: ignore[assignment]  # it may be built for another torch

CLASSES = {
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "matryoshka_batch_topk": "MatryoshkaBatchTopK",
    "jumprelu": "JumpReLU",
    "standard": "Standard",
    "matching_pursuit": "MatchingPursuit",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", choices=list(CLASSES))
    parser.add_argument("rows")
    parser.add_argument("folder")
    parser.add_argument("--k", type=float, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--dead-steps", type=int, required=True)
    parser.add_argument("--prefix-sizes", type=int, nargs="*", default=[])
    parser.add_argument("--l1-coefficient", type=float, default=1.0)
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--decay-steps", type=int, default=0)
    options = parser.parse_args()
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    rows = load_file(options.rows)["train"]
    batches = rows[: len(rows) // options.batch_size * options.batch_size].split(options.batch_size)
    settings = {
        "topk": {"k": int(options.k)},
        "batch_topk": {"k": int(options.k)},
        "matryoshka_batch_topk": {
            "k": int(options.k),
            "matryoshka_widths": options.prefix_sizes,
            "use_matryoshka_aux_loss": True,
        },
        "jumprelu": {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": options.k},
        "standard": {"l1_coefficient": options.l1_coefficient},
        "matching_pursuit": {
            "max_iterations": int(options.k),
            "residual_threshold": 0,
            "stop_on_duplicate_support": False,
            "decoder_init_norm": 1.0,
        },
    }[options.architecture]
    name = CLASSES[options.architecture]
    torch.manual_seed(options.seed)
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=rows.shape[1], d_sae=options.d_sae, **settings)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=len(batches) * options.batch_size,
            train_batch_size_samples=options.batch_size,
            lr=options.lr,
            lr_end=options.lr / 10,
            lr_warm_up_steps=options.warmup_steps,
            lr_decay_steps=options.decay_steps,
            dead_feature_window=options.dead_steps,
        ),
        sae,
        (part.float() for part in batches),
    )
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit()
    sae.cfg.metadata.hook_name = "features"
    sae.save_inference_model(options.folder)
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
