"""Compare our default settings with other libraries' best learning rates, on the same stored activations.

    .venv/bin/python benchmarks/recipes.py demo=runs/demo/store:blocks.2.resid_post [NAME=STORE:HOOK_POINT ...]
        [--peers sae_lens sparsify] [--architectures topk jumprelu] [--tokens 491520] [--seeds 3] [--our-lr 1e-3 3e-3]
        [--l0 64] [--share 0.6] [--change batch_size=1024 beta1=0.9 'rotation="none"']

All train on the same rows in the same order, in batches of 2,048, and are judged on the same held-out rows in their
form for inference. Ours take what `recipe = "auto"` chooses, except for the keys of `--change`, whose values are TOML,
or `auto` for what is chosen. Peers take each learning rate of `--lr`, with ours' shares of warm-up and decay. Where k
is not given, a peer's L0 follows from its coefficient; ours then train at two target L0s that enclose it, and are
interpolated linearly in the logarithm of L0. A row shows the peer's run that ours lead by least; with `--share`, also
what ours reach on that share of the tokens. Each run is kept in a file of `--output`, so that an interrupted table can
be resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import tomllib
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


class Run(NamedTuple):
    """What identifies a run of a table."""

    data: Data
    library: str
    architecture: str
    lr: float | None
    sparsity: float
    seed: int
    tokens: int
    changes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name of its file."""
        rate = "auto" if self.lr is None else f"{self.lr:g}"
        named = f"{self.data.name}-{self.tokens}-{self.library}-{self.architecture}"
        return "-".join([f"{named}-lr{rate}-{self.sparsity:g}-seed{self.seed}", *self.changes])


class Contest:
    """The runs of a table: trained on demand, and read from their files afterwards."""

    def __init__(self, options: argparse.Namespace):
        self._tokens, self._folder, self._changes = options.tokens, options.output, tuple(options.change)
        self._folder.mkdir(parents=True, exist_ok=True)

    def ours(
        self, data: Data, architecture: str, sparsity: float, seed: int, lr: float | None = None, share: float = 1.0
    ) -> dict:
        """Return a run of ours at a k or target L0, with the recipe's learning rate unless one is given."""
        tokens = round(self._tokens * share)
        return self._result(Run(data, "thresher", architecture, lr, sparsity, seed, tokens, self._changes))

    def theirs(self, data: Data, library: str, architecture: str, lr: float, sparsity: float, seed: int) -> dict:
        """Return a run of a peer."""
        return self._result(Run(data, library, architecture, lr, sparsity, seed, self._tokens))

    def ours_at(self, data: Data, architecture: str, l0: float, seed: int, share: float = 1.0) -> float | None:
        """Return our explained variance at an L0 of held-out rows; None where L0 is out of bounds.

        `share` is that of the peers' tokens on which ours train.
        """
        if architecture == "topk":
            return self.ours(data, architecture, round(l0), seed, share=share)["explained_variance"]
        if not LEAST_L0 <= l0 <= MOST_L0:
            return None

        def ours(step: int) -> dict:
            return self.ours(data, architecture, _target(step), seed, share=share)

        step = math.floor(2 * math.log2(l0))
        while step > _LEAST_STEP and ours(step)["l0"] > l0:
            step -= 1
        while step < _MOST_STEP and ours(step + 1)["l0"] <= l0:
            step += 1  # L0 on held-out rows is not quite that on the rows of training
        low, high = ours(step), ours(step + 1)
        if not low["l0"] <= l0 <= high["l0"]:
            return None
        between = math.log(l0 / low["l0"]) / math.log(high["l0"] / low["l0"])
        return low["explained_variance"] * (1 - between) + high["explained_variance"] * between

    def _result(self, run: Run) -> dict:
        path = self._folder / f"{run.key}.json"
        if not path.exists():
            started = time.perf_counter()
            rows = self._rows(run.data)
            if run.library == "thresher":
                found = self._train(run, rows)
            else:
                warmup_steps = max(1, round(run.tokens // BATCH / 20))
                settings = run.library, run.architecture, run.lr, run.sparsity, warmup_steps, run.seed
                found = train_peer(rows, *settings)
            result = run._asdict() | {"data": run.data.name, "seconds": round(time.perf_counter() - started, 1)} | found
            path.write_text(json.dumps(result) + "\n")
            print(json.dumps(result), file=sys.stderr, flush=True)
        return json.loads(path.read_text())

    def _rows(self, data: Data) -> Path:
        """Return the file of a hook point's training rows, in the stream's order, and its held-out rows."""
        path = self._folder / f"{data.name}-{self._tokens}.safetensors"
        export_rows(ActivationStore.open(data.store), data.hook_point, path, self._tokens)
        return path

    def _train(self, run: Run, rows: Path) -> dict[str, Any]:
        """Train one of ours, and return what it reaches on held-out rows and its L0 at the end of training."""
        sae = {"architecture": run.architecture, "hook_point": run.data.hook_point, "d_sae": D_SAE, "name": "sae"}
        sae |= {"k": round(run.sparsity)} if "topk" in run.architecture else {"target_l0": run.sparsity}
        sae |= {"seed": run.seed} | ({} if run.lr is None else {"lr": run.lr})
        tokens, output = run.tokens // BATCH * BATCH, str(self._folder / "saes" / run.key)
        given = {"store": run.data.store, "output": output, "batch_size": BATCH, "tokens": tokens, "sae": [sae]}
        for key, _, value in (change.partition("=") for change in run.changes):
            of_run = key in TrainConfig.__struct_fields__
            (given if of_run else sae)[key] = None if value == "auto" else tomllib.loads(f"value = {value}")["value"]
        (path,) = train(TrainConfig(**given))
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        last = [line["l0"] for line in lines if "l0" in line][-10:]
        return judge(Sae.load(path), load_file(rows)["test"]) | {"train_l0": sum(last) / len(last)}


def _target(step: int) -> float:
    """Return a k or target L0 of the grid in which neighbours differ by a factor of sqrt(2)."""
    return float(round(2 ** (step / 2)))


def compare(contest: Contest, options: argparse.Namespace, data: Data, architecture: str, library: str) -> str:
    """Return the row of a cell: of the peer's runs, averaged over seeds, the one that ours lead by least."""
    found, outside = [], []
    for lr in options.lr:
        for sparsity in PEERS[architecture][library]:
            theirs = [contest.theirs(data, library, architecture, lr, sparsity, seed) for seed in range(options.seeds)]
            leads = _leads(contest, data, architecture, theirs)
            l0 = statistics.mean(run["l0"] for run in theirs)
            if leads is None:
                outside.append(f"{lr:g} at L0 {l0:.0f}")
            else:
                found.append((statistics.mean(leads), max(leads) - min(leads), lr, l0, theirs))
    note = f" | not compared: {', '.join(outside)}" if outside else " |"
    n_shares = len(options.share)
    if not found:
        return f"| {data.name} | {architecture} | {library} | | | | |{' |' * n_shares}{note} |"
    lead, spread, lr, l0, theirs = min(found, key=lambda entry: entry[0])
    value = statistics.mean(run["explained_variance"] for run in theirs)
    shown = f"{lead:+.4f}" + (f" (spread {spread:.4f})" if options.seeds > 1 else "")
    for share in options.share:
        leads = _leads(contest, data, architecture, theirs, share)
        shown += " |" if leads is None else f" | {statistics.mean(leads):+.4f}"
    return (
        f"| {data.name} | {architecture} | {library} | {lr:g} | {l0:.1f} | {value:.4f} | {value + lead:.4f} | {shown}"
        f"{note} |"
    )


def _leads(
    contest: Contest, data: Data, architecture: str, theirs: list[dict], share: float = 1.0
) -> list[float] | None:
    """Return by how much ours lead at each run's L0; None where one of them is out of bounds."""
    ours = [contest.ours_at(data, architecture, run["l0"], run["seed"], share) for run in theirs]
    known = [value for value in ours if value is not None]
    if len(known) < len(ours):
        return None
    return [own - run["explained_variance"] for own, run in zip(known, theirs, strict=True)]


def main() -> None:
    """Print what ours reach at a k or target L0, and the contest's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    demo = f"demo={ROOT / 'runs/demo/store'}:blocks.2.resid_post"
    parser.add_argument("data", nargs="*", type=Data.of, default=[Data.of(demo)], metavar="NAME=STORE:HOOK_POINT")
    parser.add_argument("--architectures", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peers", nargs="*", choices=PEERS["topk"], help="libraries to compare (all if none is named)")
    parser.add_argument("--lr", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="the peers' learning rates")
    parser.add_argument("--our-lr", nargs="*", type=float, default=[], help="rates of ours to try beside the recipe's")
    parser.add_argument("--share", nargs="*", type=float, default=[], help="shares of the tokens for ours to try")
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="keys of our runs or their tables")
    parser.add_argument("--tokens", type=int, default=491_520)
    parser.add_argument("--l0", type=float, default=32, help="k or target L0 of our runs in the first table")
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
                run = contest.ours(data, architecture, options.l0, seed, lr)
                rate = "recipe's" if lr is None else f"{lr:g}"
                print(
                    f"| {data.name} | {architecture} | {rate} | {seed} | {run['explained_variance']:.4f} | "
                    f"{run['train_l0']:.1f}; {run['l0']:.1f} | {run['dead_fraction']:.0%} |",
                    flush=True,
                )
    if options.peers is None:
        return
    shares = "".join(f" on {share:.0%} of the tokens |" for share in options.share)
    print(f"\n| rows | architecture | peer | its best lr | L0 | it | ours | difference |{shares} |")
    print("|---" * (9 + len(options.share)) + "|")
    for data, architecture in cells:
        for library in PEERS[architecture]:
            if not options.peers or library in options.peers:
                print(compare(contest, options, data, architecture, library), flush=True)


if __name__ == "__main__":
    main()
