"""Time data-parallel steps on CPUs that exchange entries of the gradients, and steps that exchange whole gradients.

    .venv/bin/python benchmarks/data_exchange.py [--d-in 512 --d-sae 4096 --k 12 44 84 170] [--rounds 15]

Two processes train one TopK SAE with `parallel = "data"`. Of a batch, each latent has `batch k / (2 d_sae)` entries in
the rows of the other process: so many rows of the batch a process reads to compute gradients itself. One step of both
ways is compared first, and nothing is timed if they differ. Rounds alternate. Printed are medians over rounds of the
ratio of both ways, by wall seconds and by CPU seconds of both processes, which are steadier on a shared machine; below
1, exchanging entries takes less. `train/parallel/data.py` chooses by these numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thresher.train.architectures import make_config
from thresher.train.kernels import kernels_for
from thresher.train.lockstep import prepare_batches, step_all
from thresher.train.parallel import data
from thresher.train.parallel.layout import Layout
from thresher.train.parallel.ranks import TrainRanks
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization

OUTPUT = Path("runs/bench/data_exchange.json")
N = 2
MOST_ENTRIES = {"entries": math.inf, "gradients": -1.0}


def trainer_of(options: argparse.Namespace, k: int, layout: Layout, dtype: torch.dtype) -> SaeTrainer:
    """Return the trainer of this process."""
    return SaeTrainer(
        config=make_config(hook_point="h", architecture="topk", d_sae=options.d_sae, k=k, lr=1e-3, name="sae"),
        d_in=options.d_in,
        normalization=Normalization(torch.zeros(options.d_in), 1.0, float(options.d_in)),
        schedule=Schedule(1_000_000, options.batch_size, 1, 0.0),
        kernels=kernels_for(layout.ranks.device),
        device=layout.ranks.device,
        compute_dtype=dtype,
        across=layout.across,
        shard=layout.shard,
    )


def step(way: str, trainer: SaeTrainer, rows: torch.Tensor) -> tuple[float, float]:
    """Take a step in which all processes begin together; return its wall and CPU seconds here."""
    data._MOST_ENTRIES = MOST_ENTRIES[way]  # pyright: ignore[reportAttributeAccessIssue]
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    step_all([trainer], prepare_batches({"h": rows}, [trainer]))
    return time.perf_counter() - wall, time.process_time() - processor


def compare(options: argparse.Namespace, k: int, ranks: TrainRanks, rows: torch.Tensor) -> dict[str, float]:
    """Check a step in float32, time steps in bfloat16, and return the ratios of the two ways."""
    checked = {way: trainer_of(options, k, Layout(ranks, "data"), torch.float32) for way in MOST_ENTRIES}
    for way, trainer in checked.items():
        step(way, trainer, rows)
    for name, tensor in checked["entries"].mode.exp_avg.items():
        torch.testing.assert_close(checked["gradients"].mode.exp_avg[name], tensor, rtol=1e-4, atol=1e-7, msg=name)
        assert tensor.any()
    timed = {way: trainer_of(options, k, Layout(ranks, "data"), torch.bfloat16) for way in MOST_ENTRIES}
    pairs = []
    for round_ in range(options.rounds + 1):
        seconds = {way: torch.tensor(step(way, trainer, rows)) for way, trainer in timed.items()}
        for both in seconds.values():
            dist.all_reduce(both)
        if round_:
            pairs.append((seconds["entries"] / seconds["gradients"]).tolist())
    wall, processor = (statistics.median(ratios) for ratios in zip(*pairs, strict=True))
    elsewhere = options.batch_size * k * (N - 1) / N / options.d_sae
    return {"k": k, "entries_elsewhere": elsewhere, "wall_ratio": wall, "cpu_ratio": processor}


def train_together(rank: int, meeting: str, options: argparse.Namespace, results: Any) -> None:
    """Run as one of the processes; the first reports."""
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=N)
    ranks = TrainRanks("cpu", rank, N)
    x = torch.randn(options.batch_size, options.d_in, generator=torch.Generator().manual_seed(0))
    for k in options.k:
        found = compare(options, k, ranks, x[ranks.part(len(x))])
        if rank == 0:
            results.put(found)
    dist.destroy_process_group()


def run_processes(target: Callable[..., None], n: int, options: argparse.Namespace) -> Any:
    """Run `target(rank, meeting, options, results)` in n processes, and return the queue of their results."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        shared = str(Path(folder) / "meeting"), options, results
        processes = [context.Process(target=target, args=(rank, *shared)) for rank in range(n)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process failed")
    return results


def main() -> None:
    """Start the processes, print what they find and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--k", type=int, nargs="+", default=[12, 44, 84, 170])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="threads of a process")
    options = parser.parse_args()
    results = run_processes(train_together, N, options)
    table = [results.get() for _ in options.k]
    for row in table:
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps({"options": vars(options), "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
