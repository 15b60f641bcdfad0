"""Time a sweep's step with 1 to 8 SAEs: the cost of the n-th SAE, and whether one GEMM for all encoders is faster.

    .venv/bin/python benchmarks/marginal_cost.py [--d-in 256 --d-sae 2048 --k 32 --batch-size 2048] [--most 8]

TopK SAEs of one hook point share the preparation of the batch and take their steps in parallel. In the grouped variant,
their encoders are in one matrix `[n d_sae, d_in]`, one product gives the pre-activations of all, and each SAE selects
from its part. One step of each variant is compared first, and nothing is timed if they differ. Rounds alternate, and
medians are reported: of wall seconds, and of CPU seconds, which are steadier on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from thresher.shared.core.compute.cores import on_cores
from thresher.train.architectures import make_config
from thresher.train.architectures.parts.latents import encoded_bias
from thresher.train.kernels import kernels_for
from thresher.train.kernels.cpu.encode import row_blocks
from thresher.train.kernels.cpu.topk import topk_of_rows
from thresher.train.lockstep import prepare_batches, step_all
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.stream.normalization import Normalization

OUTPUT = Path("runs/bench/marginal_cost.json")


class Grouped:
    """The selections of a group of SAEs with one product for all encoders, in blocks of rows that stay in cache."""

    def __init__(self, trainers: list[SaeTrainer]):
        d_sae, d_in = trainers[0].mode.W_enc_compute.shape
        self.W_enc = torch.empty(len(trainers) * d_sae, d_in, dtype=trainers[0].mode.W_enc_compute.dtype)
        self.trainers = trainers
        self.parts = [slice(start, start + d_sae) for start in range(0, len(self.W_enc), d_sae)]
        self.chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, trainer in enumerate(trainers):
            own = self.W_enc[self.parts[index]]
            own.copy_(trainer.mode.W_enc_compute)
            trainer.mode.W_enc_compute = trainer.mode.optimizer.copies["W_enc"] = own
            trainer.kernels.select_topk = partial(self.select_topk, index)  # type: ignore[method-assign]

    def encode(self, x: torch.Tensor, k: int) -> None:
        """Choose the k largest latents of each SAE in each row."""
        bias = torch.cat([encoded_bias(trainer.parameters, centred=True) for trainer in self.trainers]).to(x.dtype)
        acts = x.new_empty(len(self.trainers), len(x), k)
        indices = torch.empty(len(self.trainers), len(x), k, dtype=torch.int64)

        def select(rows: slice) -> None:
            pre_acts = F.linear(x[rows], self.W_enc, bias)
            for index, part in enumerate(self.parts):
                acts[index, rows], indices[index, rows] = topk_of_rows(pre_acts[:, part], k)

        on_cores(select, row_blocks(len(x), len(self.W_enc)))
        self.chosen = list(zip(acts.relu_(), indices, strict=True))

    def select_topk(self, index: int, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents chosen for one SAE."""
        return self.chosen[index]


def trainers_for(options: argparse.Namespace, n: int, dtype: torch.dtype = torch.bfloat16) -> list[SaeTrainer]:
    """Return n trainers that differ in their seeds."""
    schedule = Schedule(1_000_000, options.batch_size, 1, 0.0)
    normalization = Normalization(torch.zeros(options.d_in), 1.0, float(options.d_in))
    keys = {"hook_point": "h", "d_sae": options.d_sae, "k": options.k, "lr": 1e-3}
    configs = [make_config(**keys, seed=seed, name=str(seed)) for seed in range(n)]
    return [
        SaeTrainer(
            config=config,
            d_in=options.d_in,
            normalization=normalization,
            schedule=schedule,
            kernels=kernels_for("cpu"),
            compute_dtype=dtype,
        )
        for config in configs
    ]


def step(trainers: list[SaeTrainer], group: Grouped | None, rows: torch.Tensor) -> list[dict[str, Any]]:
    """Take a step of every SAE on a batch."""
    prepared = prepare_batches({"h": rows}, trainers)
    if group is not None:
        (batch,) = prepared.values()
        group.encode(batch.x_compute, trainers[0].architecture.config.k)
    return list(step_all(trainers, prepared).values())


def check(options: argparse.Namespace, rows: torch.Tensor) -> None:
    """Compare a step in float32 with and without grouping."""
    alone, together = (trainers_for(options, 2, torch.float32) for _ in range(2))
    group = Grouped(together)
    for own, grouped in zip(step(alone, None, rows), step(together, group, rows), strict=True):
        torch.testing.assert_close(torch.tensor(grouped["loss"]), torch.tensor(own["loss"]), rtol=1e-5, atol=0)
    for own, grouped in zip(alone, together, strict=True):
        torch.testing.assert_close(grouped.parameters["W_dec"], own.parameters["W_dec"], rtol=1e-3, atol=2e-3)


def main() -> None:
    """Check, measure, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(options.batch_size, options.d_in, generator=generator)
    check(options, rows)
    table = []
    for n in range(1, options.most + 1):
        ways = {"separate": (trainers_for(options, n), None)}
        together = trainers_for(options, n)
        ways["grouped"] = (together, Grouped(together))
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for round_ in range(options.rounds + 1):
            for name, (trainers, group) in ways.items():
                wall, processor = time.perf_counter(), time.process_time()
                step(trainers, group, rows)
                if round_:
                    seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
        row: dict[str, Any] = {"n": n}
        for name, times in seconds.items():
            row[f"{name}_ms"], row[f"{name}_cpu_ms"] = (1e3 * statistics.median(t) for t in zip(*times, strict=True))
        table.append(row)
        print("  ".join(f"{key} {value:.1f}" if key != "n" else f"n {value}" for key, value in row.items()), flush=True)
    for name in ("separate", "grouped"):
        first, last = table[0], table[-1]
        for unit in ("ms", "cpu_ms"):
            key = f"{name}_{unit}"
            marginal = (last[key] - first[key]) / max(1, options.most - 1)
            print(f"{name}: each further SAE costs {marginal:.1f} {unit.replace('_', ' ')}, the first {first[key]:.1f}")
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps({"options": vars(options), "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
