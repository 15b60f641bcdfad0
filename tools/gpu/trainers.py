"""Train SAEs of every kind of selection on a GPU by launches and by graphs: equal bits, and the time of a step.

`python tools/gpu/trainers.py FILE` writes a JSON object, `--rehearse` at a tiny size without a GPU. TopK is trained by
its fused step and op by op; the entry `fused_step` compares their losses, and `failed_capture` says what a capture that
fails leaves behind.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from interpreter import REHEARSED, fit_interpreter

from thresher.train.architectures import make_config
from thresher.train.architectures.contract import Batch
from thresher.train.kernels import triton as fused
from thresher.train.step.sae_trainer import SaeTrainer, Schedule
from thresher.train.step.step_graphs import capture_on_cuda
from thresher.train.step.step_numbers import read_metrics
from thresher.train.stream.normalization import Normalization

DEVICE = "cpu" if REHEARSED else "cuda"
D_IN, D_SAE, K, BATCH, STEPS = (16, 24, 2, 4, 2) if REHEARSED else (768, 24_576, 32, 4096, 60)
ALWAYS = {"sparsity_warmup_steps": 0}
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {"k": K},
    "topk op by op": {"architecture": "topk", "k": K},
    "batch_topk": {"k": K},
    "jumprelu": {"l0_coefficient": 1.0, "target_l0": float(K)} | ALWAYS,
    "standard": {"l1_coefficient": 1.0} | ALWAYS,
    "gated": {"l1_coefficient": 1.0} | ALWAYS,
    "matryoshka_batch_topk": {"k": K},
}
REHEARSAL = ("topk", "topk op by op", "batch_topk")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def train(name: str, by_graphs: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an SAE's weights after some steps, and its figures."""
    config = make_config(**{"hook_point": "x", "architecture": name, "d_sae": D_SAE} | RECIPES[name])
    normalization = Normalization(torch.zeros(D_IN), 1.0, float(D_IN))
    trainer = SaeTrainer(
        config=config,
        d_in=D_IN,
        normalization=normalization,
        schedule=Schedule(1000, BATCH, 1, 0.0),
        kernels=fused.Triton(),
        device=DEVICE,
        fuse=name == "topk",
        capture=capture_on_cuda if by_graphs else None,
    )
    generator = torch.Generator(DEVICE).manual_seed(0)
    mixing = torch.randn(256, D_IN, generator=generator, device=DEVICE)
    seconds, metrics = [], {}
    for _ in range(STEPS):
        x = torch.randn(BATCH, 256, generator=generator, device=DEVICE).relu().pow(3) @ mixing / 16
        synchronize()
        began = time.perf_counter()
        metrics = trainer.step(Batch(x, x.to(torch.bfloat16)))
        synchronize()
        seconds.append(time.perf_counter() - began)
    trainer.check()
    read = read_metrics(metrics)
    if trainer.diverged or not math.isfinite(read["loss"]):
        raise AssertionError(f"diverged: {trainer.diverged}")
    figures = {
        "ms": sorted(seconds[STEPS // 2 :])[STEPS // 4] * 1e3,
        "loss": read["loss"],
        "l0": read["l0"],
        "skipped_steps": read.get("skipped_steps", 0),
        "graphs": len(trainer._graphs._graphs),
    }
    return dict(trainer.parameters), figures


def compare(name: str) -> dict[str, Any]:
    """Train an SAE twice, and return both runs' figures and whether their weights are the same bits."""
    launched, by_launches = train(name, by_graphs=False)
    replayed, by_graphs = train(name, by_graphs=not REHEARSED)
    same = all(torch.equal(weight, replayed[key]) for key, weight in launched.items())
    return {"same_bits": same, "by_launches": by_launches, "by_graphs": by_graphs}


def fused_step(results: dict[str, Any]) -> dict[str, Any]:
    """Compare the loss after TopK's fused steps with that after its steps op by op, which round differently."""
    whole, ops = (results[name]["by_launches"]["loss"] for name in ("topk", "topk op by op"))
    return {"loss": whole, "loss_op_by_op": ops, "near": abs(whole - ops) <= 0.02 * abs(ops)}


def failed_capture() -> dict[str, Any]:
    """Return what a capture that a wait breaks leaves: its stream, or memory that is not given back."""
    if REHEARSED:
        return {"rehearsed": True}
    before = torch.cuda.current_stream()
    try:
        capture_on_cuda(lambda: torch.ones(3, device="cuda").sum().item())  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        restored = torch.cuda.current_stream() == before
        torch.cuda.set_stream(before)
        held, side = torch.cuda.memory_allocated(), torch.cuda.Stream()
        for _ in range(8):
            torch.empty(64 << 20, dtype=torch.uint8, device="cuda").record_stream(side)
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")
        kept = torch.cuda.memory_allocated() - held
        return {"message": str(error)[:150], "stream_restored": restored, "bytes_kept": kept}
    return {"error": "the capture did not fail"}


def sound(result: dict[str, Any]) -> bool:
    """Return whether a result says that all is well."""
    kept = result.get("bytes_kept", 0) <= 1 << 20
    return (
        "error" not in result
        and kept
        and all(result.get(key, True) for key in ("same_bits", "near", "stream_restored"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where to write the results")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, a few SAEs at a tiny size")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    runs = {name: lambda name=name: compare(name) for name in (REHEARSAL if options.rehearse else RECIPES)}
    runs |= {"fused_step": lambda: fused_step(results), "failed_capture": failed_capture}
    with fit_interpreter() if options.rehearse else nullcontext():
        for name, run in runs.items():
            try:
                results[name] = run()
            except Exception as error:
                traceback.print_exc()
                results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            print(name, results[name], flush=True)
            options.file.write_text(json.dumps(results, indent=1))
    sys.exit(not all(map(sound, results.values())))


if __name__ == "__main__":
    main()
