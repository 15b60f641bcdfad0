"""Time the offline evaluation of eight SAEs over 100,000 stored rows, which reads the store once.

    python benchmarks/evaluate_offline.py

The same run also times the evaluation of one SAE at a time, each reading the store again, and, as a floor, only the
encoders' matrix products. Before any time is printed, every SAE's metrics are compared with float64 NumPy. CPU seconds
show the cost also on a shared machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thresher.evaluate.config import EvaluateConfig
from thresher.evaluate.run import evaluate
from thresher.shared.sae import Sae
from thresher.shared.store import ActivationStore, ActivationStoreWriter

HOOK = "blocks.2.resid_post"
CONTEXT = 256


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return an action's result, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def write_store(path: Path, n_rows: int, d_in: int) -> None:
    """Write low-rank rows with a mean, in documents of ten contexts; all contexts but the first are held out."""
    generator = torch.Generator().manual_seed(0)
    n_contexts = -(-n_rows // CONTEXT) + 1
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    with ActivationStoreWriter(path, {HOOK: d_in}, CONTEXT) as writer:
        for first in range(0, n_contexts, 16):
            n = min(16, n_contexts - first)
            latents = torch.randn(n * CONTEXT, 4 * d_in, generator=generator).sub_(2).relu_()
            contexts = np.arange(first, first + n)
            writer.append(
                {HOOK: (3 + latents @ directions).reshape(n, CONTEXT, d_in)},
                held_out=contexts > 0,
                documents=np.repeat(contexts[:, None] // 10, CONTEXT, axis=1),
            )


def write_saes(root: Path, n: int, d_in: int, d_sae: int) -> None:
    """Write TopK and ReLU SAEs, half each, with random directions; about 3% of the ReLU latents fire on a row."""
    rows = ActivationStore.open(root / "store").read(HOOK, 0, CONTEXT).float() - 3
    for number in range(n):
        generator = torch.Generator().manual_seed(number)
        W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        topk = number % 2 == 0
        tensors = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(d_sae)}
        if not topk:
            tensors["b_enc"] -= (rows @ W_dec.T).quantile(0.97, dim=0)
        sae = Sae(
            "topk" if topk else "standard",
            tensors | {"W_dec": W_dec, "b_dec": torch.full((d_in,), 3.0)},
            hook_point=HOOK,
            config={"k": 16 * (number // 2 + 1)} if topk else {"l1_coefficient": 1.0},
        )
        sae.save(root / "saes" / f"{number}-{sae.architecture}")


def check_equal(root: Path, metrics: list[dict[str, Any]]) -> None:
    """Stop unless every SAE's metrics equal those of float64 NumPy on the store's rows."""
    store = ActivationStore.open(root / "store")
    x = store.read(HOOK, CONTEXT, store.n_rows).float()
    variance = x.double().numpy().var(axis=0).sum()
    for row in metrics:
        sae = Sae.load(root / "saes" / row["name"])
        W_dec, b_dec = sae.W_dec.double().numpy(), sae.b_dec.double().numpy()
        mse = l0 = 0.0
        for part in x.split(8192):
            latents = sae.encode(part).double().numpy()
            mse += np.square(part.double().numpy() - latents @ W_dec - b_dec).sum() / len(x)
            l0 += (latents > 0).sum() / len(x)
        expected = {"n_rows": len(x), "mse": mse, "explained_variance": 1 - mse / variance, "l0": l0}
        for name, value in expected.items():
            if not np.isclose(row[name], value, rtol=1e-5):
                sys.exit(f"{row['name']}: {name} is {row[name]}, NumPy says {value}: no speed for a wrong result")


def encoder_floor(root: Path, n_saes: int, d_sae: int) -> None:
    """Multiply every held-out row with the same number of encoders, and do nothing else."""
    store = ActivationStore.open(root / "store")
    W_enc = torch.randn(store.d_in(HOOK), d_sae)
    for start in range(CONTEXT, store.n_rows, 8192):
        x = store.read(HOOK, start, min(start + 8192, store.n_rows)).float()
        for _ in range(n_saes):
            x @ W_enc


def main() -> None:
    """Measure and print one JSON object; `--output` writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--saes", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/evaluate_offline.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_store(root / "store", options.rows, options.d_in)
        write_saes(root, options.saes, options.d_in, options.d_sae)
        settings = {"store": str(root / "store"), "output": str(root / "out"), "model": False, "feature_rows": 0}
        together = EvaluateConfig(saes=str(root / "saes"), **settings)
        metrics, wall, cpu = timed(lambda: evaluate(together))
        check_equal(root, metrics)
        one_by_one = [EvaluateConfig(saes=str(path), **settings) for path in sorted((root / "saes").iterdir())]
        _, separate_wall, separate_cpu = timed(lambda: [evaluate(config) for config in one_by_one])
        _, floor_wall, floor_cpu = timed(lambda: encoder_floor(root, options.saes, options.d_sae))
    result = {
        "n_saes": options.saes,
        "rows": options.rows,
        "d_in": options.d_in,
        "d_sae": options.d_sae,
        "threads": torch.get_num_threads(),
        "seconds": wall,
        "cpu_seconds": cpu,
        "seconds_one_by_one": separate_wall,
        "cpu_seconds_one_by_one": separate_cpu,
        "seconds_encoder_floor": floor_wall,
        "cpu_seconds_encoder_floor": floor_cpu,
        "sae_rows_per_second": options.saes * options.rows / wall,
    }
    text = json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in result.items()}, indent=2)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
