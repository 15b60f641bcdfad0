"""Measure how well the stream shuffles: the design effect of a batch's mean, against an ideal uniform shuffle.

    .venv/bin/python benchmarks/train_shuffle.py --store runs/demo/store --hook-point blocks.2.resid_post

The design effect is the variance of a batch's mean activation, summed over channels, over that of a
simple random sample of the epoch without replacement: 1 is ideal, more is worse. `--window-bytes` takes
several budgets. The intra-context correlation shows the effect of an order without shuffling. The output is also
written to `--output`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from thresher.shared import ActivationStore
from thresher.train import ShuffledBatches


def design_effect(store: ActivationStore, hook_point: str, batch_size: int, window_bytes: int, epochs: int) -> float:
    """Return the design effect over whole epochs of batches."""
    moments = store.moments(hook_point)
    with ShuffledBatches(store, [hook_point], batch_size, window_bytes=window_bytes) as batches:
        n = batches.rows_per_epoch
        mean = torch.as_tensor(moments.mean)
        squares = [
            float((next(batches)[hook_point].double().mean(0) - mean).square().sum())
            for _ in range(epochs * n // batch_size)
        ]
    ideal = moments.total_variance / batch_size * (n - batch_size) / (n - 1)
    return float(np.mean(squares)) / ideal


def intra_context_correlation(store: ActivationStore, hook_point: str, n_contexts: int = 400) -> float:
    """Return the correlation of two rows of one context, from the variance of context means."""
    contexts = np.random.default_rng(0).choice(store.n_contexts, min(n_contexts, store.n_contexts), replace=False)
    rows = []
    for context in contexts:
        start, stop = context * store.context_size, (context + 1) * store.context_size
        rows.append(store.read(hook_point, start, stop)[torch.from_numpy(store.row_mask(start, stop))].double())
    within = np.mean([float(block.var(0).sum()) for block in rows])
    means = torch.stack([block.mean(0) for block in rows])
    size = np.mean([len(block) for block in rows])
    between = max(0.0, float(means.var(0).sum()) - within / size)
    return between / (between + within)


def main() -> None:
    """Print one JSON object per window budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", default="runs/demo/store")
    parser.add_argument("--hook-point", default="blocks.2.resid_post")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--window-bytes", type=int, nargs="+", default=[2 << 30, 64 << 20, 16 << 20])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/train_shuffle.json"))
    options = parser.parse_args()
    store = ActivationStore.open(options.store)
    correlation = intra_context_correlation(store, options.hook_point)
    found = []
    for window_bytes in options.window_bytes:
        effect = design_effect(store, options.hook_point, options.batch_size, window_bytes, options.epochs)
        found.append(
            {
                "window_bytes": window_bytes,
                "chunk_rows": store.chunk_rows,
                "design_effect": round(effect, 4),
                "intra_context_correlation": round(correlation, 4),
                "design_effect_without_shuffling": round(1 + (store.context_size - 1) * correlation, 1),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
