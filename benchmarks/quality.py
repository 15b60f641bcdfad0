"""Train our SAEs and the peer libraries' on the same stored activations, and set their quality side by side.

    .venv/bin/python benchmarks/quality.py [--peers] [--architectures topk batch_topk]

All train on the same rows of the demo's store in the same order (2M tokens of `blocks.2.resid_post`, batches of
2,048, 2,048 latents, warm-up of 50 steps, linear decay over the last fifth) and are judged on the same held-out
rows, each as it would be used for inference. Where L0 cannot be set, several coefficients are trained and explained
variance is interpolated at equal L0, linearly in its logarithm. The best learning rate of each side counts.
Every run's result is kept in runs/bench/quality, and trained again only if it is not there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file

from thresher.shared import ActivationStore, Sae
from thresher.train import ShuffledBatches, train
from thresher.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
HOOK = "blocks.2.resid_post"
D_SAE, BATCH, WARMUP, TEST_ROWS = 2048, 2048, 50, 65_536
AT_L0 = 32.0
BETA2 = {"topk": 0.95}  # ours only; 0.99 elsewhere: a run of a thousand steps is short for Adam's usual 0.999
KEYS = {"jumprelu": "l0_coefficient", "gated": "l1_coefficient", "standard": "l1_coefficient"}
LRS = {"topk": (1e-3, 3e-3), "batch_topk": (1e-3, 3e-3), "jumprelu": (1e-3,), "gated": (1e-3,), "standard": (1e-3,)}
SPARSITIES: dict[str, dict[str, tuple[float, ...]]] = {
    "topk": {"thresher": (32,), "sae_lens": (32,), "dictionary_learning": (32,), "sparsify": (32,)},
    "batch_topk": {"thresher": (32,), "sae_lens": (32,), "dictionary_learning": (32,)},
    "jumprelu": {"thresher": (1e-3, 2e-3, 4e-3), "sae_lens": (0.25, 0.5, 1.0), "dictionary_learning": (16, 32, 64)},
    "gated": {"thresher": (1.0, 2.0, 4.0), "sae_lens": (1.0, 2.0, 4.0), "dictionary_learning": (0.05, 0.1, 0.2)},
    "standard": {"thresher": (1.5, 2.5, 4.0), "sae_lens": (1.5, 2.5, 4.0), "dictionary_learning": (0.1, 0.16, 0.25)},
}


def export_rows(store: ActivationStore, path: Path, tokens: int) -> None:
    """Write the rows to train on, in the stream's order, and held-out ones to judge on."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    size = store.context_size
    with ShuffledBatches(store, [HOOK], BATCH, 0, "cpu") as batches:
        train_rows = torch.cat([next(batches)[HOOK].to(torch.bfloat16) for _ in range(tokens // BATCH)])
    held_out = torch.from_numpy(store.held_out_contexts()).nonzero().flatten().tolist()[: TEST_ROWS // size]
    parts = [(store.read(HOOK, c * size, (c + 1) * size), store.row_mask(c * size, (c + 1) * size)) for c in held_out]
    test = torch.cat([rows[torch.from_numpy(mask)] for rows, mask in parts])
    partial = path.with_suffix(".partial")
    save_file({"train": train_rows, "test": test.to(torch.bfloat16)}, partial)
    partial.rename(path)


def ours(options: argparse.Namespace, architecture: str, lr: float, sparsity: float) -> dict[str, Any]:
    """Train one of ours from the store and judge what it saved."""
    key = KEYS.get(architecture, "k")
    sae = {"architecture": architecture, "hook_point": HOOK, "d_sae": D_SAE, "lr": lr, "name": "sae"}
    output = options.output / "saes" / f"{architecture}-{lr:g}-{sparsity:g}"
    config = TrainConfig(
        store=str(options.store),
        output=str(output),
        sae=[sae | {key: int(sparsity) if key == "k" else sparsity, "beta2": BETA2.get(architecture, 0.99)}],
        batch_size=BATCH,
        tokens=options.tokens,
        warmup_steps=WARMUP,
        decay_fraction=0.2,
    )
    started = time.perf_counter()
    (folder,) = train(config)
    return {**judge(Sae.load(folder), load_file(options.rows)["test"]), "seconds": time.perf_counter() - started}


@torch.no_grad()
def judge(sae: Sae, test: torch.Tensor) -> dict[str, float]:
    """Return explained variance, L0 and the share of latents that never fire."""
    error, active, fired = 0.0, 0, torch.zeros(D_SAE, dtype=torch.int64)
    for x in test.float().split(4096):
        latents = sae.encode(x)
        error += float((sae.decode(latents) - x).double().square().sum())
        active += int((latents != 0).sum())
        fired += (latents != 0).sum(0)
    variance = float((test.double() - test.double().mean(0)).square().sum())
    dead = float((fired == 0).double().mean())
    return {"explained_variance": 1 - error / variance, "l0": active / len(test), "dead_fraction": dead}


def theirs(options: argparse.Namespace, library: str, architecture: str, lr: float, sparsity: float) -> dict[str, Any]:
    """Train a peer's in its own environment."""
    command = [ROOT / ".venv-peers/bin/python", ROOT / "benchmarks/peers/train_quality.py", library, architecture]
    command += [options.rows, "--lr", lr, "--sparsity", sparsity]
    command += ["--d-sae", D_SAE, "--batch-size", BATCH, "--warmup-steps", WARMUP]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{library} {architecture} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def result_of(options: argparse.Namespace, library: str, architecture: str, lr: float, sparsity: float) -> dict:
    """Return a run's result, from its file if it was trained before."""
    path = options.output / f"{library}-{architecture}-lr{lr:g}-{sparsity:g}.json"
    if not path.exists():
        run = {"library": library, "architecture": architecture, "lr": lr, "sparsity": sparsity}
        trained = (
            ours(options, architecture, lr, sparsity)
            if library == "thresher"
            else theirs(options, library, architecture, lr, sparsity)
        )
        path.write_text(json.dumps(run | trained) + "\n")
        print(json.dumps(run | trained), flush=True)
    return msgspec.json.decode(path.read_bytes())


def at_equal_l0(runs: list[dict[str, Any]]) -> float | None:
    """Interpolate explained variance at `AT_L0`, linearly in log L0; None where the runs do not enclose it."""
    points = sorted((run["l0"], run["explained_variance"]) for run in runs)
    for (low, at_low), (high, at_high) in pairwise(points):
        if low <= AT_L0 <= high:
            share = math.log(AT_L0 / low) / math.log(high / low) if high > low else 0.0
            return at_low + share * (at_high - at_low)
    return next((value for l0, value in points if abs(l0 - AT_L0) < 0.5), None)


def best(runs: list[dict[str, Any]]) -> tuple[float | None, str]:
    """Return the best learning rate's explained variance at equal L0, and the points that it came from."""
    by_lr = {lr: [run for run in runs if run["lr"] == lr] for lr in {run["lr"] for run in runs}}
    values = {lr: at_equal_l0(some) for lr, some in by_lr.items()}
    known = {lr: value for lr, value in values.items() if value is not None}
    lr = max(known, key=lambda rate: known[rate]) if known else max(by_lr)
    points = ", ".join(f"{run['l0']:.1f}: {run['explained_variance']:.4f}" for run in by_lr[lr])
    return known.get(lr), f"lr {lr:g}; {points}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=ROOT / "runs/demo/store")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/bench/quality")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--architectures", nargs="+", choices=SPARSITIES, default=list(SPARSITIES))
    parser.add_argument("--peers", action="store_true", help="train the peers too, in .venv-peers")
    options = parser.parse_args()
    options.rows = options.output / "rows.safetensors"
    export_rows(ActivationStore.open(options.store), options.rows, options.tokens)
    lines = [f"| architecture | library | explained variance at L0 {AT_L0:g} | from (L0: explained variance) |"]
    lines += ["|---|---|---|---|"]
    for architecture in options.architectures:
        for library, sparsities in SPARSITIES[architecture].items():
            if library != "thresher" and not options.peers:
                continue
            runs = [result_of(options, library, architecture, lr, s) for lr in LRS[architecture] for s in sparsities]
            value, source = best(runs)
            shown = "not enclosed" if value is None else f"{value:.4f}"
            lines.append(f"| {architecture} | {library} | {shown} | {source} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
