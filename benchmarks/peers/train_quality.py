"""Train another library's SAE with its own trainer on given activations; print its quality as JSON.

    .venv-peers/bin/python benchmarks/peers/train_quality.py LIBRARY ARCHITECTURE ROWS --lr 1e-3 --sparsity 32

The file contains `train [n, d_in]`, in training order, and `test [m, d_in]`. SAELens and dictionary_learning train with
their own trainer classes, sparsify with its module's loss and projections and Adam. Recipes are each library's, except
for what must be equal: batches, learning rate, warm-up, linear decay over the last fifth, and latents that count as
dead after a tenth of the run. Inputs are scaled as each library recommends: to a mean norm of sqrt(d_in), or for
dictionary_learning to a mean square norm of one. Sparsities and losses refer to these scales.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.modules["torchvision"] = None  # type: ignore[assignment]  # it may be built for another torch

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From scaled rows to latents and reconstruction."""


def sae_lens(options: argparse.Namespace, batches: list[Tensor], d_in: int) -> Encoder:
    """Train with SAELens's `SAETrainer`; evaluate the SAE that it saves for inference."""
    import sae_lens as library
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    n = len(batches)
    name = {"topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU", "gated": "Gated", "standard": "Standard"}
    kind = f"{name[options.architecture]}TrainingSAE"
    sparsity: dict[str, Any] = {
        "topk": {"k": int(options.sparsity)},
        "batch_topk": {"k": options.sparsity},
        "jumprelu": {"l0_coefficient": options.sparsity, "l0_warm_up_steps": n // 20},
        "gated": {"l1_coefficient": options.sparsity, "l1_warm_up_steps": n // 20},
        "standard": {"l1_coefficient": options.sparsity, "l1_warm_up_steps": n // 20},
    }[options.architecture]
    sae = getattr(library, kind)(getattr(library, f"{kind}Config")(d_in=d_in, d_sae=options.d_sae, **sparsity))
    sae.b_dec.data = torch.cat(batches[:32]).mean(0)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=n * options.batch_size,
            train_batch_size_samples=options.batch_size,
            lr=options.lr,
            lr_end=options.lr / 10,
            lr_warm_up_steps=options.warmup_steps,
            lr_decay_steps=n // 5,
            dead_feature_window=n // 10,
        ),
        sae,
        iter(batches),
    )
    trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = library.SAE.load_from_disk(folder)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = saved.encode(x)
        return latents, saved.decode(latents)

    return encode


def dictionary_learning(options: argparse.Namespace, batches: list[Tensor], d_in: int) -> Encoder:
    """Train with dictionary_learning's trainer classes."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
    from dictionary_learning.trainers.standard import StandardTrainer

    n = len(batches)
    shared = {
        "steps": n,
        "activation_dim": d_in,
        "dict_size": options.d_sae,
        "layer": 0,
        "lm_name": "",
        "device": "cpu",
    }
    shared |= {"lr": options.lr, "warmup_steps": options.warmup_steps, "decay_start": n - n // 5, "seed": options.seed}
    thresholds = {"threshold_start_step": n // 2}
    sparse_warmup = {"sparsity_warmup_steps": n // 20}
    make: dict[str, Callable[[], Any]] = {
        "topk": lambda: trainers.TopKTrainer(**shared, k=int(options.sparsity), **thresholds),
        "batch_topk": lambda: trainers.BatchTopKTrainer(**shared, k=int(options.sparsity), **thresholds),
        "jumprelu": lambda: trainers.JumpReluTrainer(**shared, target_l0=options.sparsity, **sparse_warmup),
        "gated": lambda: GatedAnnealTrainer(
            **shared, initial_sparsity_penalty=options.sparsity, anneal_start=n - 1, p_end=1, **sparse_warmup
        ),
        "standard": lambda: StandardTrainer(**shared, l1_penalty=options.sparsity, **sparse_warmup),
    }
    trainer = make[options.architecture]()
    trainer.dead_feature_threshold = n * options.batch_size // 10
    for step, x in enumerate(batches):
        trainer.update(step, x)
    by_threshold = {"use_threshold": True} if options.architecture == "batch_topk" else {}

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = trainer.ae.encode(x, **by_threshold)
        return latents, trainer.ae.decode(latents)

    return encode


def sparsify(options: argparse.Namespace, batches: list[Tensor], d_in: int) -> Encoder:
    """Train sparsify's module with its loss with AuxK, its projections, and Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=options.d_sae, k=int(options.sparsity)))
    sae.b_dec.data = torch.cat(batches[:32]).mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=options.lr)
    n, since_fired = len(batches), torch.zeros(options.d_sae, dtype=torch.int64)
    for step, x in enumerate(batches):
        factor = min((step + 1) / options.warmup_steps, (n - step) / (n // 5), 1.0)
        optimizer.param_groups[0]["lr"] = options.lr * factor
        sae.set_decoder_norm_to_unit_norm()
        output = sae(x, dead_mask=since_fired > n * options.batch_size // 10)
        (output.fvu + output.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired += len(x)
        since_fired[output.latent_indices.flatten()] = 0

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        output = sae(x)
        return torch.zeros(len(x), options.d_sae).scatter_(1, output.latent_indices, output.latent_acts), output.sae_out

    return encode


LIBRARIES = {"sae_lens": sae_lens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("architecture", choices=["topk", "batch_topk", "jumprelu", "gated", "standard"])
    parser.add_argument("rows")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument(
        "--sparsity", type=float, required=True, help="k, target L0 or coefficient, as the library has it"
    )
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = load_file(options.rows)
    train, test = data["train"], data["test"].float()
    norms = torch.cat([x.float().norm(dim=1) for x in train.split(65536)])
    one = options.library == "dictionary_learning"
    scale = float(norms.square().mean().rsqrt()) if one else train.shape[1] ** 0.5 / float(norms.mean())
    torch.manual_seed(options.seed)
    batches = Scaled(train, options.batch_size, scale)
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        encode = LIBRARIES[options.library](options, batches, train.shape[1])  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    error, active, fired = 0.0, 0, torch.zeros(options.d_sae, dtype=torch.int64)
    with torch.no_grad():
        for x in test.split(4096):
            latents, x_hat = encode(x * scale)
            error += float((x_hat / scale - x).double().square().sum())
            active += int((latents != 0).sum())
            fired += (latents != 0).sum(0)
    variance = float((test.double() - test.double().mean(0)).square().sum())
    result = {"explained_variance": 1 - error / variance, "l0": active / len(test)}
    result |= {"dead_fraction": float((fired == 0).double().mean()), "seconds": seconds}
    print(json.dumps(result))


class Scaled:
    """Batches of float32 rows, scaled on demand."""

    def __init__(self, rows: Tensor, batch_size: int, scale: float):
        self._parts, self._scale = rows[: len(rows) // batch_size * batch_size].split(batch_size), scale

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int | slice) -> Any:
        part = self._parts[index]
        return [x.float() * self._scale for x in part] if isinstance(index, slice) else part.float() * self._scale

    def __iter__(self) -> Iterator[Tensor]:
        return (part.float() * self._scale for part in self._parts)


if __name__ == "__main__":
    main()
