"""Time a sweep of eight TopK SAEs, including the harvest, against eight SAELens runs and its multi-SAE runner.

    .venv/bin/python benchmarks/sweep_of_eight.py [--tokens 400000] [--d-sae 4096] [--kinds separate multi]

Ours is the two commands of a user, from the bundled model and this Python's standard library to eight saved SAEs; every
second of both processes counts. SAELens's runners get the tokens that we trained on, already prepared, and their
imports and tokenizing do not count. Ours takes a minute and theirs ten, and the machine's speed may change meanwhile:
ours is therefore run before and after each of theirs, and the mean of the two counts. 400,000 tokens are 180 steps of
2,048: enough to compare the reconstructions, and few enough for the eight runs to end in minutes. Every SAE's explained
variance is measured on the same held-out rows, and no ratio is printed if any is below `--least-explained`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import rmtree
from statistics import mean
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from thresher.shared import ActivationStore, Sae

ROOT = Path(__file__).parents[1]
HOOK, HOOK_OF_SAELENS = "blocks.2.resid_post", "transformer.h.2"
KS = (16, 24, 32, 40, 48, 56, 64, 80)
BATCH_SIZE, LR = 2048, 4e-3
TARGETS = {"separate": 10, "multi": 5}
HARVEST = """
model = "{root}/models/stdlib-lm"
dataset = "python-stdlib"
hook_points = ["{hook}"]
context_size = 256
tokens = {tokens}
holdout_fraction = 0.02
store = "{folder}/store"
"""
TRAIN = """
store = "{folder}/store"
output = "{folder}/saes"
batch_size = {batch_size}
epochs = 1.0
warmup_steps = {warmup}
decay_fraction = 0.2
[[sae]]
name = "k{{k}}"
hook_point = "{hook}"
d_sae = {d_sae}
k = {ks}
lr = {lr}
beta2 = 0.95
"""


def ours(folder: Path, n_tokens: int, d_sae: int) -> dict[str, float]:
    """Harvest and train as a user would; return the seconds of each stage."""
    folder.mkdir()
    n_steps = n_tokens // BATCH_SIZE
    keys = {"root": ROOT, "folder": folder, "tokens": n_tokens, "hook": HOOK, "batch_size": BATCH_SIZE, "lr": LR}
    keys |= {"warmup": n_steps // 20, "d_sae": d_sae, "ks": list(KS)}
    took = {}
    for stage, template in (("harvest", HARVEST), ("train", TRAIN)):
        config = folder / f"{stage}.toml"
        config.write_text(template.format(**keys))
        started = time.perf_counter()
        command = [sys.executable, "-m", f"thresher.{stage}", str(config)]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        took[stage] = time.perf_counter() - started
    return took | {"seconds": sum(took.values())}


def theirs(kind: str, folder: Path, tokens: Path, n_tokens: int, d_sae: int) -> dict[str, float]:
    """Run SAELens's runners on the tokens; return their seconds."""
    runner, *autocast = kind.split("_")
    keys = {"model": ROOT / "models/stdlib-lm", "hook": HOOK_OF_SAELENS, "d-in": 256, "d-sae": d_sae, "lr": LR}
    keys |= {"batch-size": BATCH_SIZE, "n-tokens": n_tokens}
    arguments = [str(part) for key, value in keys.items() for part in (f"--{key}", value)]
    arguments += ["--ks", *map(str, KS), *(["--autocast"] if autocast else [])]
    script = ROOT / "benchmarks/peers/sweep.py"
    command = [
        str(ROOT / ".venv-peers/bin/python"),
        "-W",
        "ignore",
        str(script),
        runner,
        str(tokens),
        str(folder / kind),
    ]
    done = subprocess.run(
        command + arguments, capture_output=True, text=True, cwd=folder, env=os.environ | {"WANDB_MODE": "disabled"}
    )
    if done.returncode:
        raise SystemExit(f"SAELens failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def explained_variances(folder: Path, rows: torch.Tensor) -> dict[str, float]:
    """Return each SAE's explained variance of the rows."""
    total = float((rows - rows.mean(0)).square().sum())
    found = {}
    for k in KS:
        sae = Sae.load(str(folder / f"k{k}"))
        with torch.no_grad():
            found[f"k{k}"] = round(1 - sum(float((sae(x) - x).square().sum()) for x in rows.split(4096)) / total, 4)
    return found


def main() -> None:
    """Run ours and theirs, evaluate all SAEs, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--kinds", nargs="*", default=["separate", "multi", "separate_bf16", "multi_bf16"])
    parser.add_argument("--least-explained", type=float, default=0.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def judged(result: dict[str, Any], saes: Path, rows: torch.Tensor) -> dict[str, Any]:
            explained = explained_variances(saes, rows)
            if min(explained.values()) < options.least_explained:
                raise SystemExit(f"SAEs explain {explained}: they have not trained, so speeds say nothing")
            return result | {"explained_variance": explained}

        first = ours(folder / "first", options.tokens, options.d_sae)
        store = ActivationStore.open(str(folder / "first/store"))
        held_out = np.asarray(store.held_out_contexts())
        tokens = store.tokens(0, store.n_rows)
        assert tokens is not None
        tokens = tokens.view(-1, store.context_size).long()
        path = folder / "tokens.safetensors"
        save_file({"tokens": tokens[torch.from_numpy(~held_out)].contiguous()}, path)
        mask = torch.from_numpy(store.row_mask(0, store.n_rows) & np.repeat(held_out, store.context_size))
        rows = store.read(HOOK, 0, store.n_rows).float()[mask]
        n_trained = int((~held_out).sum()) * store.context_size
        runs = [judged(first, folder / "first/saes", rows)]
        results: dict[str, Any] = {"thresher": runs}
        print(json.dumps({"tokens": n_trained, "held_out_rows": len(rows), "thresher": runs[0]}), flush=True)
        for kind in options.kinds:
            taken = theirs(kind, folder, path, n_trained, options.d_sae)
            results[kind] = judged(taken, folder / kind, rows)
            again = ours(folder / "again", options.tokens, options.d_sae)
            runs.append(judged(again, folder / "again/saes", rows))
            rmtree(folder / "again")
            results[kind]["ratio"] = taken["seconds"] / mean(run["seconds"] for run in runs[-2:])
            print(json.dumps({"thresher": runs[-1], kind: results[kind]}), flush=True)
    for kind in options.kinds:
        target = f" (target {TARGETS[kind]}x)" if kind in TARGETS else ""
        print(f"a sweep of eight, over SAELens {kind.replace('_', ', ')}: {results[kind]['ratio']:.1f}x{target}")
    output = ROOT / f"runs/bench/sweep_of_eight_{options.d_sae}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"options": vars(options), "results": results}, indent=1))


if __name__ == "__main__":
    main()
