"""Compare our default settings with other libraries' best learning rates, on the same stored activations.

    .venv/bin/python benchmarks/recipes.py demo=runs/demo/store:blocks.2.resid_post [NAME=STORE:HOOK_POINT ...]
        [--peers sae_lens sparsify] [--architectures topk jumprelu] [--tokens 491520] [--seeds 3] [--our-lr 1e-3 3e-3]

All train on the same rows in the same order, in batches of 2,048, and are judged on the same held-out rows in their
form for inference. Ours take what `recipe = "auto"` chooses. Peers take each learning rate of `--lr`, with ours' shares
of warm-up and decay. Where k is not given, a peer's L0 follows from its coefficient; ours then train at two target L0s
that enclose it, and are interpolated linearly in the logarithm of L0. A row shows the peer's run that ours lead by
least. Each run is kept in a file of `--output`, so that an interrupted table can be resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from thresher.shared import ActivationStore, Sae
from thresher.train import train
from thresher.train.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves this folder out

from quality import BATCH, D_SAE, ROOT, export_rows, judge, train_peer

PEERS: dict[str, dict[str, tuple[float, ...]]] = {
    "topk": {"sae_lens": (32,), "dictionary_learning": (32,), "sparsify": (32,)},
    "batch_topk": {"sae_lens": (32,), "dictionary_learning": (32,)},
    "jumprelu": {"sae_lens": (1.0,), "dictionary_learning": (32,)},
    "gated": {"sae_lens": (1.0,), "dictionary_learning": (0.1,)},
    "standard": {"sae_lens": (2.5,), "dictionary_learning": (0.1,)},
}
"""Each peer's k, target L0 or coefficients."""
LEAST_L0, MOST_L0 = 8, 200
"""Ours are compared with peers whose L0 is between these; others are not sparse enough to be of use."""
_LEAST_STEP, _MOST_STEP = 4, 17  # of `_target`


class Data(NamedTuple):
    """A hook point of a store, and its name in the table."""

    name: str
    store: str
    hook_point: str

    @classmethod
    def of(cls, given: str) -> Data:
        """Return what `NAME=STORE:HOOK_POINT` spells."""
        name, _, location = given.partition("=")
        store, _, hook_point = location.rpartition(":")
        if not (name and store and hook_point):
            raise argparse.ArgumentTypeError(f"expected NAME=STORE:HOOK_POINT, got '{given}'")
        return cls(name, store, hook_point)


class Contest:
    """The runs of a table: trained on demand, and read from their files afterwards."""

    def __init__(self, options: argparse.Namespace):
        self._options, self._folder = options, options.output
        self._folder.mkdir(parents=True, exist_ok=True)

    def ours(self, data: Data, architecture: str, sparsity: float, seed: int, lr: float | None = None) -> dict:
        """Return a run of ours at a k or target L0, with the recipe's learning rate unless one is given."""
        return self._run(data, "thresher", architecture, lr, sparsity, seed)

    def theirs(self, data: Data, library: str, architecture: str, lr: float, sparsity: float, seed: int) -> dict:
        """Return a run of a peer."""
        return self._run(data, library, architecture, lr, sparsity, seed)

    def ours_at(self, data: Data, architecture: str, l0: float, seed: int) -> float | None:
        """Return our explained variance at an L0 of held-out rows; None where L0 is out of bounds."""
        if architecture == "topk":
            return self.ours(data, architecture, round(l0), seed)["explained_variance"]
        if not LEAST_L0 <= l0 <= MOST_L0:
            return None
        step = math.floor(2 * math.log2(l0))
        while step > _LEAST_STEP and self.ours(data, architecture, _target(step), seed)["l0"] > l0:
            step -= 1
        while step < _MOST_STEP and self.ours(data, architecture, _target(step + 1), seed)["l0"] <= l0:
            step += 1  # L0 on held-out rows is not quite that on the rows of training
        low, high = (self.ours(data, architecture, _target(step + more), seed) for more in (0, 1))
        if not low["l0"] <= l0 <= high["l0"]:
            return None
        share = math.log(l0 / low["l0"]) / math.log(high["l0"] / low["l0"])
        return low["explained_variance"] * (1 - share) + high["explained_variance"] * share

    def _run(self, data: Data, library: str, architecture: str, lr: float | None, sparsity: float, seed: int) -> dict:
        rate = "auto" if lr is None else f"{lr:g}"
        key = f"{data.name}-{self._options.tokens}-{library}-{architecture}-lr{rate}-{sparsity:g}-seed{seed}"
        path = self._folder / f"{key}.json"
        if not path.exists():
            started = time.perf_counter()
            rows = self._rows(data)
            folder = self._folder / "saes" / key
            if library == "thresher":
                found = self._train(data, rows, folder, architecture, lr, sparsity, seed)
            else:
                warmup_steps = max(1, round(self._options.tokens // BATCH / 20))
                found = train_peer(rows, library, architecture, lr, sparsity, warmup_steps, seed)
            run = {"data": data.name, "library": library, "architecture": architecture, "lr": lr, "sparsity": sparsity}
            run |= {"seed": seed, "seconds": round(time.perf_counter() - started, 1)} | found
            path.write_text(json.dumps(run) + "\n")
            print(json.dumps(run), file=sys.stderr, flush=True)
        return json.loads(path.read_text())

    def _rows(self, data: Data) -> Path:
        """Return the file of a hook point's training rows, in the stream's order, and its held-out rows."""
        path = self._folder / f"{data.name}-{self._options.tokens}.safetensors"
        export_rows(ActivationStore.open(data.store), data.hook_point, path, self._options.tokens)
        return path

    def _train(
        self, data: Data, rows: Path, folder: Path, architecture: str, lr: float | None, sparsity: float, seed: int
    ) -> dict[str, Any]:
        """Train one of ours, and return what it reaches on held-out rows and its L0 at the end of training."""
        by_k = "topk" in architecture
        sae = {"architecture": architecture, "hook_point": data.hook_point, "d_sae": D_SAE, "name": "sae", "seed": seed}
        sae |= {"k": round(sparsity)} if by_k else {"target_l0": sparsity}
        sae |= {} if lr is None else {"lr": lr}
        tokens = self._options.tokens // BATCH * BATCH
        config = TrainConfig(store=data.store, output=str(folder), sae=[sae], batch_size=BATCH, tokens=tokens)
        (path,) = train(config)
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        last = [line["l0"] for line in lines if "l0" in line][-10:]
        return judge(Sae.load(path), load_file(rows)["test"]) | {"train_l0": sum(last) / len(last)}


def _target(step: int) -> float:
    """Return a k or target L0 of the grid in which neighbours differ by a factor of sqrt(2)."""
    return float(round(2 ** (step / 2)))


def compare(contest: Contest, options: argparse.Namespace, data: Data, architecture: str, library: str) -> str:
    """Return the row of a cell: of the peer's runs, averaged over seeds, the one that ours lead by least."""
    seeds, found, outside = range(options.seeds), [], []
    for lr in options.lr:
        for sparsity in PEERS[architecture][library]:
            theirs = [contest.theirs(data, library, architecture, lr, sparsity, seed) for seed in seeds]
            ours = [contest.ours_at(data, architecture, run["l0"], run["seed"]) for run in theirs]
            l0 = statistics.mean(run["l0"] for run in theirs)
            known = [value for value in ours if value is not None]
            if len(known) < len(ours):
                outside.append(f"{lr:g} at L0 {l0:.0f}")
                continue
            leads = [own - run["explained_variance"] for own, run in zip(known, theirs, strict=True)]
            value = statistics.mean(run["explained_variance"] for run in theirs)
            found.append((statistics.mean(leads), max(leads) - min(leads), lr, l0, value, statistics.mean(known)))
    note = f" | not compared: {', '.join(outside)}" if outside else " |"
    if not found:
        return f"| {data.name} | {architecture} | {library} | | | | |{note} |"
    lead, spread, lr, l0, value, own = min(found)
    shown = f"{lead:+.4f}" + (f" (spread {spread:.4f})" if options.seeds > 1 else "")
    return f"| {data.name} | {architecture} | {library} | {lr:g} | {l0:.1f} | {value:.4f} | {own:.4f} | {shown}{note} |"


def main() -> None:
    """Print what ours reach at k or target L0 32, and the contest's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    demo = f"demo={ROOT / 'runs/demo/store'}:blocks.2.resid_post"
    parser.add_argument("data", nargs="*", type=Data.of, default=[Data.of(demo)], metavar="NAME=STORE:HOOK_POINT")
    parser.add_argument("--architectures", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peers", nargs="*", choices=PEERS["topk"], help="libraries to compare (all if none is named)")
    parser.add_argument("--lr", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="the peers' learning rates")
    parser.add_argument("--our-lr", nargs="*", type=float, default=[], help="rates of ours to try beside the recipe's")
    parser.add_argument("--tokens", type=int, default=491_520)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/bench/recipes")
    options = parser.parse_args()
    contest = Contest(options)
    cells = [(data, architecture) for architecture in options.architectures for data in options.data]
    print("| rows | architecture | lr | seed | explained variance | L0 at the end; held-out | dead |")
    print("|---|---|---|---|---|---|---|")
    for data, architecture in cells:
        for lr in (None, *options.our_lr):
            for seed in range(options.seeds):
                run = contest.ours(data, architecture, 32, seed, lr)
                rate = "recipe's" if lr is None else f"{lr:g}"
                print(
                    f"| {data.name} | {architecture} | {rate} | {seed} | {run['explained_variance']:.4f} | "
                    f"{run['train_l0']:.1f}; {run['l0']:.1f} | {run['dead_fraction']:.0%} |",
                    flush=True,
                )
    if options.peers is None:
        return
    print("\n| rows | architecture | peer | its best lr | L0 | it | ours | difference | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for data, architecture in cells:
        for library in PEERS[architecture]:
            if not options.peers or library in options.peers:
                print(compare(contest, options, data, architecture, library), flush=True)


if __name__ == "__main__":
    main()
