"""Train our SAEs and SAELens's on the same rows of a synthetic law, and compare both with the true features.

    .venv/bin/python benchmarks/ground_truth.py [--peers] [--own-rate] [--seeds 0 1 2] [--architectures topk jumprelu]

All train on the same 2 million rows of `synth-1k` in the same order: 256 latents, k = 6, batches of 1,024, learning
rate 1e-3, and latents that are dead after a tenth of the run. Everything else is each library's default; with
`--own-rate`, ours also train at the rate that `recipe = "auto"` chooses, with `--scheduled` SAELens's with our warm-up
and decay of the rate. SAELens's coefficient and target are chosen so that L0 is near k on held-out rows. All are judged
in their form for inference, on the same 100,000 rows drawn anew, and again after `refine = "leave_one_out"`, whose
thresholds come from training rows. A seed is one of the initial weights. Intervals are Student's over seeds, for their
mean. Results are kept in `--output`, and a run is trained again only if its result is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from thresher.evaluate import EvaluateConfig, evaluate
from thresher.harvest import HarvestConfig, harvest
from thresher.shared import ActivationStore
from thresher.train import train
from thresher.train.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves this folder out

from quality import ROOT, export_rows

TOKENS, D_SAE, K, BATCH, LR = 2_000_000, 256, 6, 1024, 1e-3
STEPS = TOKENS // BATCH
PREFIXES = [16, 64, 256]
OURS: dict[str, dict[str, Any]] = {
    "batch_topk": {"architecture": "batch_topk", "k": K},
    "matryoshka_batch_topk": {"architecture": "matryoshka_batch_topk", "k": K, "prefix_sizes": PREFIXES},
    "lista_matryoshka": {"architecture": "lista_matryoshka", "k": K, "prefix_sizes": PREFIXES},
    "topk": {"architecture": "topk", "k": K},
    "matching_pursuit": {"architecture": "matching_pursuit", "k": K},
    "jumprelu": {"architecture": "jumprelu", "target_l0": K},
    "standard": {"architecture": "standard", "target_l0": K},
    "random": {"architecture": "random", "k": K},
    "frozen_decoder": {"architecture": "batch_topk", "k": K, "freeze": ["W_dec"]},
}
PEERS = ("batch_topk", "matryoshka_batch_topk", "topk", "jumprelu", "standard", "matching_pursuit")
PEER_L1, PEER_TARGET_L0 = 3.0, 3.7
"""SAELens's L1 coefficient and JumpReLU's target that come to an L0 near k on held-out rows here."""
SHOWN = ("f1", "mcc", "precision", "recall", "uniqueness", "explained_variance", "l0")
OWN_RATE = "Thresher, own rate"
Run = dict[str, Any]


def train_ours(options: argparse.Namespace, library: str, name: str, seed: int, folder: Path) -> None:
    """Train one of our SAEs from the store, at the rate of all or at its recipe's."""
    table = {"hook_point": "features", "d_sae": D_SAE, "seed": seed, "name": "sae"} | OURS[name]
    table |= {} if library == OWN_RATE else {"lr": LR}
    config = TrainConfig(
        store=str(options.store),
        output=str(folder),
        sae=[table],
        batch_size=BATCH,
        tokens=TOKENS,
        window_bytes=1 << 30,
        rotation=options.rotation,
    )
    train(config)


def train_peer(options: argparse.Namespace, library: str, name: str, seed: int, folder: Path) -> None:
    """Train one of SAELens's SAEs on the same rows in the peers' environment."""
    command: list[Any] = [ROOT / ".venv-peers/bin/python", ROOT / "benchmarks/peers/synthetic.py", name, options.rows]
    k = PEER_TARGET_L0 if name == "jumprelu" else K
    command += [folder / "sae", "--k", k, "--lr", LR, "--seed", seed, "--d-sae", D_SAE, "--batch-size", BATCH]
    command += ["--dead-steps", STEPS // 10, "--prefix-sizes", *PREFIXES[:-1], "--l1-coefficient", PEER_L1]
    if library == "SAELens, scheduled":
        command += ["--warmup-steps", STEPS // 20, "--decay-steps", STEPS // 5]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    if done.returncode:
        sys.exit(f"SAELens's {name} failed: {done.stderr.strip().splitlines()[-1]}")


def judge(options: argparse.Namespace, folder: Path) -> Run:
    """Return a saved SAE's ground-truth metrics, L0 and explained variance on the held-out rows, also when refined."""
    config = EvaluateConfig(
        store=str(options.store),
        saes=[str(folder / "sae")],
        output=str(folder / "evaluation"),
        device="cpu",
        feature_rows=0,
        dictionary=False,
        bootstrap_samples=0,
        allow_other_model=True,
        refine="leave_one_out",
    )
    row, *refined = evaluate(config)
    kept = (*SHOWN, "dead_fraction", "absorption", "splitting", "shrinkage")
    found = {key: row[key] for key in kept}
    return found | {"refined": {key: refined[0][key] for key in kept} if refined else None}


def result_of(options: argparse.Namespace, library: str, name: str, seed: int) -> Run:
    """Return a run's result, from its file if it was trained before."""
    ours = library in ("Thresher", OWN_RATE)
    rotation = f"-rotation-{options.rotation}" if ours and options.rotation else ""
    file = f"{library.replace(', ', '-').lower()}{rotation}-{name}-{seed}"
    path, folder = options.output / f"{file}.json", options.output / file
    run = json.loads(path.read_text()) if path.exists() else {"library": library, "name": name, "seed": seed}
    if "seconds" not in run:
        started = time.perf_counter()
        if ours:
            train_ours(options, library, name, seed, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            train_peer(options, library, name, seed, folder)
        run["seconds"] = time.perf_counter() - started
    if "refined" not in run:
        run |= judge(options, folder)
        path.write_text(json.dumps(run) + "\n")
        print(json.dumps(run), flush=True)
    return run


def mean_and_half_width(values: list[float]) -> tuple[float, float | None]:
    """Return the mean of values and half the width of its 95% interval by Student's t; None for a single value."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)


def cells_of(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Return the cells of a table's row: each metric's mean over rows, and its interval if there are several."""
    cells = []
    for metric in metrics:
        mean, half = mean_and_half_width([row[metric] for row in rows])
        cells.append(f"{mean:.3f}" + ("" if half is None else f" ± {half:.3f}"))
    return " | ".join(cells)


def table(runs: list[Run]) -> list[str]:
    """Return a row per library and SAE, with means over seeds and their intervals."""
    lines = ["| | " + " | ".join(("seeds", *SHOWN)) + " |", "|" + "---|" * (len(SHOWN) + 2)]
    refined = [run | run["refined"] | {"library": f"{run['library']}, refined"} for run in runs if run["refined"]]
    runs = [*runs, *refined]
    order = {name: number for number, name in enumerate(OURS)}
    for key in sorted(dict.fromkeys((run["name"], run["library"]) for run in runs), key=lambda key: order[key[0]]):
        some = [run for run in runs if (run["name"], run["library"]) == key]
        lines.append(f"| `{key[0]}`, {key[1]} | {len(some)} | {cells_of(some, SHOWN)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=ROOT / "runs/synth-1k/store")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/bench/ground_truth")
    parser.add_argument("--architectures", nargs="+", choices=OURS, default=list(OURS)[:2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--peers", action="store_true", help="train SAELens's too, in .venv-peers")
    parser.add_argument("--scheduled", action="store_true", help="train them also with our warm-up and decay")
    parser.add_argument("--own-rate", action="store_true", help="train ours also at the learning rate of its recipe")
    parser.add_argument("--rotation", choices=("none", "pca"), help="rotation for ours; default: the recipe's")
    options = parser.parse_args()
    options.rows = options.output / "rows.safetensors"
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.store.exists():
        law = {"model": "synthetic:synth-1k", "hook_points": ["features"]}
        harvest(HarvestConfig(**law, store=str(options.store), tokens=TOKENS))
    libraries = ["Thresher", *([OWN_RATE] if options.own_rate else [])]
    if options.peers:
        libraries += ["SAELens", *(["SAELens, scheduled"] if options.scheduled else [])]
        export_rows(ActivationStore.open(options.store), "features", options.rows, TOKENS, BATCH)
    runs = [
        result_of(options, library, name, seed)
        for seed in options.seeds
        for library in libraries
        for name in options.architectures
        if library.startswith("Thresher") or name in PEERS
    ]
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
