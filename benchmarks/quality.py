"""Train our SAEs and the peer libraries' SAEs on the same stored activations, and compare their quality.

    .venv/bin/python benchmarks/quality.py [--peers] [--architectures topk batch_topk]

All train on the same rows of the demo's store in the same order (2M tokens of `blocks.2.resid_post`, batches of
2,048, 2,048 latents, warm-up of 50 steps, linear decay over the last fifth) and are evaluated on the same held-out
rows, in their form for inference. Each of a peer's SAEs is compared with ours at the same L0: our explained variance is
interpolated between our SAEs, linearly in the logarithm of L0. Each side counts with its best learning rate. Results
are kept in runs/bench/quality, and a run is trained again only if its result is missing.
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
BETA2 = {"topk": 0.95}  # ours only; 0.99 elsewhere: a run of a thousand steps is short for Adam's usual 0.999
MORE = {
    "jumprelu": {"l0_coefficient": 1.0},
    "gated": {"beta1": 0.9, "decoder_lr_scale": 3.0, "threshold_lr_scale": 0.3},
}
KEYS = {"jumprelu": "target_l0", "gated": "l1_coefficient", "standard": "l1_coefficient"}
LRS = {
    "topk": (1e-3, 3e-3),
    "batch_topk": (1e-3, 3e-3),
    "jumprelu": (1e-3, 3e-3),
    "gated": (1e-3, 3e-3, 1e-2),
    "standard": (1e-3,),
}
BY_K = ("topk", "batch_topk", ("jumprelu", "dictionary_learning"))
SPARSITIES: dict[str, dict[str, tuple[float, ...]]] = {
    "topk": {"thresher": (32,), "sae_lens": (32,), "dictionary_learning": (32,), "sparsify": (32,)},
    "batch_topk": {"thresher": (26, 32, 40), "sae_lens": (32,), "dictionary_learning": (32,)},
    "jumprelu": {"thresher": (20, 27, 35, 90), "sae_lens": (0.5,), "dictionary_learning": (32,)},
    "gated": {"thresher": (1.0, 1.3, 1.7), "sae_lens": (1.0,), "dictionary_learning": (0.1,)},
    "standard": {"thresher": (1.0, 1.5, 2.5, 4.0), "sae_lens": (1.5, 2.5), "dictionary_learning": (0.1,)},
}


def export_rows(store: ActivationStore, hook_point: str, path: Path, tokens: int, batch_size: int = BATCH) -> None:
    """Write the training rows, in the stream's order, and held-out rows for evaluation."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    size = store.context_size
    with ShuffledBatches(store, [hook_point], batch_size, 0, "cpu") as batches:
        train_rows = torch.cat([next(batches)[hook_point].to(torch.bfloat16) for _ in range(tokens // batch_size)])
    held_out = torch.from_numpy(store.held_out_contexts()).nonzero().flatten().tolist()[: TEST_ROWS // size]
    parts = [
        (store.read(hook_point, c * size, (c + 1) * size), store.row_mask(c * size, (c + 1) * size)) for c in held_out
    ]
    test = torch.cat([rows[torch.from_numpy(mask)] for rows, mask in parts])
    partial = path.with_suffix(".partial")
    save_file({"train": train_rows, "test": test.to(torch.bfloat16)}, partial)
    partial.rename(path)


def ours(options: argparse.Namespace, architecture: str, lr: float, sparsity: float) -> dict[str, Any]:
    """Train one of our SAEs from the store and evaluate the saved SAE."""
    key = KEYS.get(architecture, "k")
    sae = {"architecture": architecture, "hook_point": HOOK, "d_sae": D_SAE, "lr": lr, "name": "sae"}
    output = options.output / "saes" / f"{architecture}-{lr:g}-{sparsity:g}"
    config = TrainConfig(
        store=str(options.store),
        output=str(output),
        sae=[
            sae
            | {key: int(sparsity) if key == "k" else sparsity, "beta2": BETA2.get(architecture, 0.99)}
            | MORE.get(architecture, {})
        ],
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
        error += float((sae.decode(latents, x) - x).double().square().sum())
        active += int((latents != 0).sum())
        fired += (latents != 0).sum(0)
    variance = float((test.double() - test.double().mean(0)).square().sum())
    dead = float((fired == 0).double().mean())
    return {"explained_variance": 1 - error / variance, "l0": active / len(test), "dead_fraction": dead}


def train_peer(
    rows: Path, library: str, architecture: str, lr: float, sparsity: float, warmup_steps: int = WARMUP, seed: int = 0
) -> dict[str, Any]:
    """Train a peer's SAE on exported rows in the peers' environment."""
    command = [ROOT / ".venv-peers/bin/python", ROOT / "benchmarks/peers/train_quality.py", library, architecture]
    command += [rows, "--lr", lr, "--sparsity", sparsity, "--seed", seed]
    command += ["--d-sae", D_SAE, "--batch-size", BATCH, "--warmup-steps", warmup_steps]
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
            else train_peer(options.rows, library, architecture, lr, sparsity)
        )
        path.write_text(json.dumps(run | trained) + "\n")
        print(json.dumps(run | trained), flush=True)
    return msgspec.json.decode(path.read_bytes())


def at_l0(runs: list[dict[str, Any]], l0: float) -> float | None:
    """Return the best learning rate's explained variance at an L0, interpolated; None where no runs enclose it."""
    values = []
    for lr in {run["lr"] for run in runs}:
        points = sorted((run["l0"], run["explained_variance"]) for run in runs if run["lr"] == lr)
        values += [value for at, value in points if abs(at - l0) < 1e-6]
        for (low, at_low), (high, at_high) in pairwise(points):
            if low < l0 < high:
                values.append(at_low + math.log(l0 / low) / math.log(high / low) * (at_high - at_low))
    return max(values, default=None)


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """Return a row per architecture, peer and sparsity: the peer's best learning rate, and ours at the same L0.

    If the sparsity is a coefficient, each learning rate gives a different L0 and has its own row. The last column is
    ours with only the peer's learning rate.
    """
    lines = ["| architecture | peer | lr | L0 | its explained variance | ours at that L0 | difference | at its lr |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for architecture, by_library in results.items():
        for library, runs in by_library.items():
            if library == "thresher":
                continue
            by_k = architecture in BY_K or (architecture, library) in BY_K
            for sparsity, lr in sorted({(run["sparsity"], None if by_k else run["lr"]) for run in runs}):
                group = (r for r in runs if r["sparsity"] == sparsity and lr in (None, r["lr"]))
                best = max(group, key=lambda r: r["explained_variance"])
                theirs, all_ours = best["explained_variance"], by_library["thresher"]
                own = at_l0(all_ours, best["l0"])
                alike = at_l0([run for run in all_ours if run["lr"] == best["lr"]], best["l0"])
                shown = "not enclosed |" if own is None else f"{own:.4f} | {own - theirs:+.4f}"
                shown += " | not enclosed" if alike is None else f" | {alike:.4f}"
                lines.append(
                    f"| {architecture} | {library} | {best['lr']:g} | {best['l0']:.1f} | {theirs:.4f} | {shown} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=ROOT / "runs/demo/store")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/bench/quality")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--architectures", nargs="+", choices=SPARSITIES, default=list(SPARSITIES))
    parser.add_argument("--peers", action="store_true", help="train the peers too, in .venv-peers")
    options = parser.parse_args()
    options.rows = options.output / "rows.safetensors"
    export_rows(ActivationStore.open(options.store), HOOK, options.rows, options.tokens)
    results = {
        architecture: {
            library: [result_of(options, library, architecture, lr, s) for lr in LRS[architecture] for s in sparsities]
            for library, sparsities in SPARSITIES[architecture].items()
            if library == "thresher" or options.peers
        }
        for architecture in options.architectures
    }
    for runs in (results[architecture]["thresher"] for architecture in results):
        for run in runs:
            print(f"ours: {run['architecture']}, lr {run['lr']:g}, L0 {run['l0']:.1f}: {run['explained_variance']:.4f}")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
