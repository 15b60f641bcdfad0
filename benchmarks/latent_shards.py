"""Time steps of one SAE whose latents are divided over processes, and steps of one process that has all of them.

    .venv/bin/python benchmarks/latent_shards.py [--d-in 512 --d-sae 8192 --k 32 --batch-size 2048] [--rounds 10]
    .venv/bin/python benchmarks/latent_shards.py --processes 8 --d-in 4096 --d-sae 1048576 --k 64 --apart

With CUDA each process has a GPU of its own and they meet over NCCL, otherwise over gloo with one thread each. A step in
float32 of the processes together is first compared with that of one process, and nothing is timed if they differ.
Rounds alternate. Printed are medians over rounds: milliseconds of a step, CPU seconds of all processes (which are
steadier on a shared machine), and bytes that a process exchanges. `share` is together / alone: 1 / processes would be
ideal of wall time, 1 of CPU time. `--apart` leaves out the process that has all latents, for SAEs that do not fit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thresher.train.lockstep import prepare_batches, step_all
from thresher.train.parallel.layout import Layout
from thresher.train.parallel.ranks import TrainRanks
from thresher.train.step.sae_trainer import SaeTrainer

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves this folder out

from data_exchange import run_processes, trainer_of

OUTPUT = Path("runs/bench/latent_shards.json")


def step(trainer: SaeTrainer, rows: torch.Tensor) -> tuple[float, float]:
    """Take a step; return its wall and CPU seconds in this process."""
    wall, processor = time.perf_counter(), time.process_time()
    step_all([trainer], prepare_batches({"h": rows}, [trainer]))
    if rows.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def check(options: argparse.Namespace, alone: Layout, together: Layout, rows: torch.Tensor) -> None:
    """Compare Adam's moments after a step in float32: those of the latents here, and those that all processes have."""
    one, part = (trainer_of(options, options.k, layout, torch.float32) for layout in (alone, together))
    step(one, rows)
    step(part, rows)
    here = together.latents_here(options.d_sae)
    for name, found in part.mode.exp_avg.items():
        whole = one.mode.exp_avg[name]
        expected = whole if found.shape == whole.shape else whole[here]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=name)
        assert found.any()


def measure(options: argparse.Namespace, ranks: TrainRanks, rows: torch.Tensor) -> dict[str, float]:
    """Check a step, then time both ways in turn, in bfloat16."""
    layouts = {"together": Layout(ranks, "latents")}
    if not options.apart:
        layouts["alone"] = Layout(TrainRanks(ranks.device))
        check(options, layouts["alone"], layouts["together"], rows)
    trainers = {
        way: trainer_of(options, options.k, layout, torch.bfloat16)
        for way, layout in layouts.items()
        if way == "together" or ranks.rank == 0
    }
    seconds: dict[str, list[list[float]]] = {way: [] for way in layouts}
    for round_ in range(options.rounds + 1):
        for way in layouts:
            dist.barrier()
            taken = torch.zeros(2, device=ranks.device)
            if way in trainers:
                taken += torch.tensor(step(trainers[way], rows), device=ranks.device)
            most = taken[:1].clone()
            ranks.greatest(most)
            ranks.add(taken)
            if round_:  # the first compiles and warms up
                seconds[way].append([float(most), float(taken[1])])
    # A process sends and receives every other's candidates, and a partial reconstruction in float32.
    candidates = 4 * ranks.n * options.batch_size * options.k
    found: dict[str, float] = {"exchanged_bytes": candidates + 2 * 4 * options.batch_size * options.d_in}
    for way, rounds in seconds.items():
        wall, processor = (statistics.median(column) for column in zip(*rounds, strict=True))
        found |= {f"{way}_ms": 1e3 * wall, f"{way}_cpu_seconds": processor}
    if not options.apart:
        for name in ("ms", "cpu_seconds"):
            found[f"share_{name}"] = found[f"together_{name}"] / found[f"alone_{name}"]
    return found


def train_together(rank: int, meeting: str, options: argparse.Namespace, results: Any) -> None:
    """Run as one of the processes; the first reports."""
    cuda = torch.cuda.is_available()
    device = f"cuda:{rank}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    n = options.processes
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=n)
    x = torch.randn(options.batch_size, options.d_in, generator=torch.Generator().manual_seed(0))
    found = measure(options, TrainRanks(device, rank, n), x.to(device))
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Start the processes, print what they find and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--apart", action="store_true", help="do not time one process that has all latents")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    found = run_processes(train_together, options.processes, options).get()
    print("  ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    options.output.write_text(json.dumps({"options": told, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
