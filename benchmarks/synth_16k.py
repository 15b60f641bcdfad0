"""Run SynthSAEBench-16k unattended: five architectures at seven L0s with five seeds, and a table with intervals.

    .venv/bin/python benchmarks/synth_16k.py [--tokens 50000000] [--seeds 5] [--output runs/synth-16k] [--rehearse]

It draws the rows, trains 35 SAEs per seed from one pass over them, and compares all with the true features, also after
`refine = "leave_one_out"`. Settings are those of configs/*/synth-16k.toml. Every stage resumes, so that after an
interruption the same command continues; a seed that was evaluated is not evaluated again. Meant for a GPU of 24 GB or
more, and 50 GB of disk. Intervals are Student's over seeds, for the mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from thresher.evaluate import EvaluateConfig, evaluate
from thresher.harvest import HarvestConfig, harvest
from thresher.shared.core.config import load_config
from thresher.train import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves this folder out

from ground_truth import cells_of
from quality import ROOT

SHOWN = ("f1", "mcc", "explained_variance", "l0")
REHEARSAL: dict[str, dict[str, Any]] = {
    "harvest": {"model": "synthetic:synth-1k", "tokens": 8192, "holdout_fraction": 0.2, "chunk_bytes": 4096},
    "train": {"batch_size": 512, "epochs": 1.0},
    "sae": {"d_sae": 64, "prefix_sizes": None},
    "evaluate": {"ground_truth_rows": 500, "bootstrap_samples": 0, "baselines": []},
}
"""What `--rehearse` changes in the configurations: None leaves a key out of the tables."""
Row = dict[str, Any]


def configured(kind: type[Any], stage: str, **changes: Any) -> Any:
    """Return the stage's configuration with changes; those that are None leave it as it is."""
    config = load_config(kind, ROOT / "configs" / stage / "synth-16k.toml", [])
    return msgspec.structs.replace(config, **{key: value for key, value in changes.items() if value is not None})


def metrics_of(options: argparse.Namespace, seed: int) -> list[Row]:
    """Train and evaluate a seed's SAEs, unless that was finished before; return their metrics."""
    done = options.output / f"seed-{seed}.json"
    if not done.exists():
        store, saes = str(options.output / "store"), str(options.output / f"saes-{seed}")
        config = configured(TrainConfig, "train", store=store, output=saes, **options.small["train"])
        tables = [{**sae, "seed": seed, **options.small["sae"]} for sae in config.sae]
        tables = [{key: value for key, value in sae.items() if value is not None} for sae in tables]
        train(msgspec.structs.replace(config, sae=tables))
        evaluation = {"store": store, "saes": saes, "output": str(options.output / f"evaluation-{seed}")}
        config = configured(EvaluateConfig, "evaluate", **evaluation, feature_rows=0, **options.small["evaluate"])
        rows = evaluate(config)
        partial = done.with_suffix(".partial")
        partial.write_text(json.dumps(rows) + "\n")
        partial.rename(done)
    return json.loads(done.read_text())


def table(by_seed: Sequence[Sequence[Row]]) -> list[str]:
    """Return a row per architecture and L0, with means over seeds and their intervals; refined SAEs have their own."""
    found: dict[tuple[str, float], list[Row]] = {}
    for rows in by_seed:
        for row in rows:
            if row.get("baseline") is None and row.get("error") is None:
                name = row["architecture"] + (", refined" if row["name"].endswith("+leave_one_out") else "")
                found.setdefault((name, float(row["k"] or row["target_l0"])), []).append(row)
    lines = ["| | k or target L0 | seeds | " + " | ".join(SHOWN) + " |", "|" + "---|" * (len(SHOWN) + 3)]
    for (name, sparsity), rows in sorted(found.items()):
        lines.append(f"| `{name}` | {sparsity:g} | {len(rows)} | {cells_of(rows, SHOWN)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs/synth-16k")
    parser.add_argument("--tokens", type=int, help="rows to draw")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rehearse", action="store_true", help="do the same at a tiny size, in a minute on a CPU")
    options = parser.parse_args(arguments)
    options.small = REHEARSAL if options.rehearse else {part: {} for part in REHEARSAL}
    options.output.mkdir(parents=True, exist_ok=True)
    rows = {"store": str(options.output / "store"), "tokens": options.tokens} | options.small["harvest"]
    harvest(configured(HarvestConfig, "harvest", **rows))
    lines = table([metrics_of(options, seed) for seed in range(options.seeds)])
    (options.output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
