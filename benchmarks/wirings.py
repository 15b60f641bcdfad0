"""Print what SAEs that read or write several hook points explain with default settings, at the same k or target L0.

    .venv/bin/python benchmarks/wirings.py NAME=STORE:READS[:WRITES] [...] [--architectures topk standard]

READS and WRITES are hook points with commas between them. Where WRITES is given, a transcoder reads the first and
predicts the second, also with a skip path; with several of each, it is a cross-layer transcoder. Without it, a
crosscoder reads and reconstructs all of READS. All train on the same rows in the same order, and are judged on the same
held-out rows. Results are kept in `--output`; runs that are complete there are not trained again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from thresher.evaluate import EvaluateConfig, evaluate
from thresher.train import train
from thresher.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("topk", "batch_topk", "jumprelu", "gated", "standard")


class Wiring(NamedTuple):
    """What the SAEs of some rows of the table read and write."""

    name: str
    store: str
    reads: list[str]
    writes: list[str]

    @classmethod
    def of(cls, given: str) -> Wiring:
        """Return what `NAME=STORE:READS[:WRITES]` spells."""
        name, _, location = given.partition("=")
        store, *hook_points = location.split(":")
        if not (name and store and 1 <= len(hook_points) <= 2 and all(hook_points)):
            raise argparse.ArgumentTypeError(f"expected NAME=STORE:READS[:WRITES], got '{given}'")
        reads, writes = [*hook_points, ""][:2]
        return cls(name, store, reads.split(","), writes.split(",") if writes else [])

    def tables(self, options: argparse.Namespace) -> list[dict[str, Any]]:
        """Return the [[sae]] tables of its SAEs."""
        made = []
        for architecture in options.architectures:
            sparsity = {"k": options.l0} if "topk" in architecture else {"target_l0": float(options.l0)}
            sae = {"name": architecture, "architecture": architecture, "d_sae": options.d_sae} | sparsity
            if not self.writes:
                made.append(sae | {"hook_points": self.reads})
            elif len(self.reads) > 1:
                # The target is the sum over layers, but k is each layer's.
                per_layer = {"k": options.l0 // len(self.reads)} if "topk" in architecture else {}
                made.append(sae | per_layer | {"reads": self.reads, "writes": self.writes, "cross_layer": True})
            else:
                sae |= {"reads": self.reads[0], "writes": self.writes[0]}
                made += [sae, sae | {"name": f"{architecture}-skip", "skip": True}]
        return made


def main() -> None:
    """Train and judge each wiring's SAEs, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wirings", nargs="+", type=Wiring.of, metavar="NAME=STORE:READS[:WRITES]")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=["topk", "standard"])
    parser.add_argument("--rotation", choices=["pca", "none"], help="instead of the recipe's")
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=491_520)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/bench/wirings")
    options = parser.parse_args()
    print("| rows | architecture | explained variance | L0, held-out | dead |")
    print("|---|---|---|---|---|")
    for wiring in options.wirings:
        folder = options.output / wiring.name
        train(
            TrainConfig(
                store=wiring.store,
                output=str(folder / "saes"),
                sae=wiring.tables(options),
                batch_size=options.batch_size,
                tokens=options.tokens,
                rotation=options.rotation,
            )
        )
        rows = evaluate(
            EvaluateConfig(
                store=wiring.store,
                saes=str(folder / "saes"),
                output=str(folder / "evaluation"),
                model=False,
                max_rows=16_384,
                feature_rows=0,
                dictionary=False,
                bootstrap_samples=0,
            )
        )
        for row in rows:
            print(
                f"| {wiring.name} | {row['name']} | {row['explained_variance']:.4f} | {row['l0']:.1f} | "
                f"{row['dead_fraction']:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
