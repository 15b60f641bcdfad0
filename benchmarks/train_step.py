"""Time a whole TopK training step, phase by phase, and the peers' steps beside it.

    .venv/bin/python benchmarks/train_step.py [--d-in 768 --d-sae 12288 --k 32 --batch-size 4096] [--peers]

Equality with the reference operations is checked first; nothing is timed if it fails. With `--peers` each
library's step runs in `.venv-peers`, in turns with ours, on the same rows. Tokens per CPU second are
printed too: on a machine with other work they are the steadier figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from thresher.train.architectures.base import Batch, StepInput
from thresher.train.config import SaeConfig
from thresher.train.kernels import kernels_for
from thresher.train.normalization import Normalization
from thresher.train.sae_trainer import SaeTrainer, Schedule

ROOT = Path(__file__).parents[1]
OPERATIONS = (
    "pre_activations",
    "select_topk",
    "decode",
    "grad_values",
    "to_csc",
    "grad_weights",
    "grad_weights_and_bias",
    "sum_by_latent",
)
PEERS = ("sae_lens", "sparsify")


def timed(kernels: Any, seconds: dict[str, float]) -> Any:
    """Return the operations, each adding its time to `seconds`."""

    def wrap(name: str) -> Any:
        operation = getattr(kernels, name)

        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = operation(*arguments)
            seconds[name] += time.perf_counter() - started
            return result

        return call

    return SimpleNamespace(**vars(kernels) | {name: wrap(name) for name in OPERATIONS})


def trainer_for(options: argparse.Namespace, kernels: Any, dtype: torch.dtype = torch.bfloat16) -> SaeTrainer:
    """Return a TopK trainer on inputs that are normalised already."""
    config = SaeConfig(hook_point="h", d_sae=options.d_sae, k=options.k, lr=1e-3)
    schedule = Schedule(1_000_000, options.batch_size, 1, 0.0)
    normalization = Normalization(torch.zeros(options.d_in), 1.0, float(options.d_in))
    return SaeTrainer(config, options.d_in, normalization, schedule, kernels, dtype)


def check(options: argparse.Namespace) -> None:
    """Compare one step's gradients in float32 with the reference operations'."""
    small = argparse.Namespace(d_in=64, d_sae=512, k=options.k, batch_size=256)
    x = torch.randn(256, 64)
    gradients = []
    for backend in ("cpu", "reference"):
        trainer = trainer_for(small, kernels_for("cpu", backend), torch.float32)
        step = StepInput(trainer.kernels, trainer.W_enc_compute, 64.0)
        gradients.append(trainer.architecture.step(trainer.parameters, Batch(x, x), step).gradients)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=f"gradient of {name}")


def ours(options: argparse.Namespace, rows: torch.Tensor) -> dict[str, Any]:
    """Time our step on the rows, with the share of each operation."""
    seconds: dict[str, float] = defaultdict(float)
    trainer = trainer_for(options, timed(kernels_for("cpu"), seconds))
    batches = list(rows.split(options.batch_size))
    adam = trainer.optimizer.step

    def optimizer_step(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = adam(*arguments)
        seconds["optimizer"] += time.perf_counter() - started
        return result

    trainer.optimizer.step = optimizer_step  # type: ignore[method-assign]
    for x in batches[:2]:
        trainer.step(Batch(x, x.bfloat16()))
    seconds.clear()
    started, cpu = time.perf_counter(), time.process_time()
    for x in batches:
        trainer.step(Batch(x, x.bfloat16()))
    total, cpu = time.perf_counter() - started, time.process_time() - cpu
    seconds["rest"] = total - sum(seconds.values())
    return {
        "library": "thresher",
        "tokens_per_second": len(rows) / total,
        "tokens_per_cpu_second": len(rows) / cpu,
        "milliseconds": {name: round(1e3 * value / len(batches), 2) for name, value in seconds.items()},
    }


def peer(library: str, options: argparse.Namespace, rows_path: Path) -> dict[str, Any]:
    """Run a peer's script and return what it prints."""
    sizes = ["--d-sae", options.d_sae, "--k", options.k, "--batch-size", options.batch_size]
    command = [ROOT / ".venv-peers/bin/python", ROOT / "benchmarks/peers/train_topk.py", library, rows_path, *sizes]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Check, measure and print one JSON object per library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=384)
    parser.add_argument("--d-sae", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    check(options)
    codes = torch.randn(options.steps * options.batch_size, 64).relu_()
    rows = codes @ torch.randn(64, options.d_in) / 8 + 0.3 * torch.randn(len(codes), options.d_in)
    rows -= rows.mean(0)
    print(json.dumps(ours(options, rows)))
    if options.peers:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.safetensors"
            save_file({"train": rows, "test": rows[:256].clone()}, path)
            for library in PEERS:
                theirs, own = peer(library, options, path), ours(options, rows)
                print(json.dumps(theirs))
                print(json.dumps(own))
                print(f"thresher over {library}: {own['tokens_per_second'] / theirs['tokens_per_second']:.1f}x")


if __name__ == "__main__":
    main()
