"""Train with default settings on several stores, and print explained variance and L0 on held-out rows.

    .venv/bin/python benchmarks/recipes.py demo=runs/demo/store:blocks.2.resid_post \\
        gemma=runs/gemma/store:blocks.9.resid_post gemma-mlp=runs/gemma/store:blocks.9.mlp_out [--lr 1e-3 3e-3 8e-3]

Every store is read once (one epoch) in batches of 2,048 for 2,048 latents, with what `recipe = "auto"` chooses and, for
`topk`, each of the `--lr` beside it. L0 is printed twice: on the last ten batches and on the held-out rows. Results are
kept in `--output` and printed from there, so that an interrupted table can be resumed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from thresher import EvaluateConfig, TrainConfig, evaluate, train

SAES: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk", "k": 32},
    "batch_topk": {"architecture": "batch_topk", "k": 32},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 32},
    "gated": {"architecture": "gated", "target_l0": 32},
    "standard": {"architecture": "standard", "target_l0": 32},
}


def measure(store: str, hook_point: str, settings: dict[str, Any], seed: int, folder: Path) -> dict[str, float]:
    """Train one SAE and return its explained variance, its L0 at the end of training, and its L0 on held-out rows."""
    sae = settings | {"hook_point": hook_point, "d_sae": 2048, "seed": seed, "name": "sae"}
    (path,) = train(
        TrainConfig(store=store, output=str(folder / "saes"), sae=[sae], batch_size=2048, log_every_steps=1)
    )
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    last = [line["l0"] for line in lines if "l0" in line][-10:]
    (found,) = evaluate(
        EvaluateConfig(
            store=store,
            saes=[str(path)],
            output=str(folder / "evaluation"),
            model=False,
            feature_rows=0,
            dictionary=False,
            bootstrap_samples=0,
        )
    )
    return {
        "explained_variance": found["explained_variance"],
        "train_l0": sum(last) / len(last),
        "l0": found["l0"],
        "dead_fraction": found["dead_fraction"],
        "steps": lines[-1]["step"],
    }


def main() -> None:
    """Fill the table's missing cells, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", nargs="+", metavar="NAME=STORE:HOOK_POINT")
    parser.add_argument("--architectures", nargs="+", choices=SAES, default=list(SAES))
    parser.add_argument("--lr", nargs="*", type=float, default=[], help="learning rates of topk to try as well")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/recipes"))
    options = parser.parse_args()
    wanted = {name: SAES[name] for name in options.architectures}
    wanted |= {f"topk lr {lr:g}": SAES["topk"] | {"lr": lr} for lr in options.lr}
    results = options.output / "results.json"
    table: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for given in options.stores:
        name, _, location = given.partition("=")
        store, _, hook_point = location.rpartition(":")
        for label, settings in wanted.items():
            for seed in range(options.seeds):
                key = f"{name} {label} seed {seed}"
                if key not in table:
                    folder = options.output / key.replace(" ", "_")
                    table[key] = measure(store, hook_point, settings, seed, folder)
                    results.write_text(json.dumps(table, indent=1) + "\n")
                row = table[key]
                print(
                    f"{key:32} explained variance {row['explained_variance']:.4f}, L0 {row['train_l0']:.1f}; "
                    f"{row['l0']:.1f}, {100 * row['dead_fraction']:.0f}% dead after {row['steps']} steps",
                    flush=True,
                )


if __name__ == "__main__":
    main()
