"""Time the kernels and a whole TopK step on a GPU, each against its floor, PyTorch and the peers.

`make bench-gpu` runs it and writes `runs/bench/gpu_step.json`. Every kernel is held against its reference
first; a wrong one ends the run before a time is printed. `--peers PYTHON` names an interpreter that has the
peer libraries; each runs in a process of its own, under bfloat16 autocast where it has no such path itself.
`--rehearse` runs every line at tiny sizes, without a GPU in Triton's interpreter, and prints no times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PEERS = ("dense", "sparsify", "dictionary_learning", "sae_lens")
# An H200's, on which the design's floors rest; override for another GPU.
FLOPS, BYTES_PER_SECOND = 790e12, 4.3e12


class Size(NamedTuple):
    """A step's size and its floor on an H200 in milliseconds, from the design."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    floor_ms: float | None


SIZES = [Size(768, 24_576, 32, 4096, 0.60), Size(768, 24_576, 32, 32_768, 3.0), Size(4096, 131_072, 64, 4096, 14.0)]
REHEARSAL = [Size(32, 24, 2, 4, None)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/gpu_step.json"))
    parser.add_argument("--peers", help="Python interpreter of an environment with the peer libraries")
    parser.add_argument("--flops", type=float, default=FLOPS, help="bfloat16 operations a second of this GPU")
    parser.add_argument("--bandwidth", type=float, default=BYTES_PER_SECOND, help="bytes a second of its memory")
    parser.add_argument("--store-tokens", type=int, default=1 << 21, help="rows of the stores that are streamed")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, no times; runs without a GPU")
    return parser.parse_args()


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a call on the GPU, after warming up."""
    import torch

    for _ in range(3):
        run()
    if not torch.cuda.is_available():
        return float("nan")
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def make_problem(size: Size, device: Any) -> tuple[dict[str, Any], Any]:
    """Return initial parameters and a batch with a few strong directions, so that selection has work to do."""
    import torch

    generator = torch.Generator(device=device).manual_seed(0)
    W_dec = torch.randn(size.d_sae, size.d_in, generator=generator, device=device)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    directions = torch.randint(size.d_sae, (size.batch, size.k), generator=generator, device=device)
    noise = torch.randn(size.batch, size.d_in, generator=generator, device=device)
    x = torch.stack([W_dec[chosen].sum(0) for chosen in directions]) * 4 + noise
    zeros = torch.zeros(size.d_sae, device=device), torch.zeros(size.d_in, device=device)
    parameters = {"W_enc": W_dec.clone(), "b_enc": zeros[0], "W_dec": W_dec, "b_dec": zeros[1]}
    return parameters, x.to(torch.bfloat16)


def kernel_times(size: Size, device: Any, flops: float, bandwidth: float) -> dict[str, Any]:
    """Check each kernel against its reference on some rows, then time it; floors from operations and bytes."""
    import torch

    from thresher.train.kernels import fused, reference

    parameters, x = make_problem(size, device)
    W = parameters["W_dec"].to(torch.bfloat16)
    bias, (B, d, F, k) = parameters["b_enc"], (size.batch, size.d_in, size.d_sae, size.k)
    acts, indices, failed = fused.select_topk_certified(x, W, bias, k)
    rows = slice(0, min(B, 256))
    expected, _ = reference.select_topk(x[rows], W, bias, k)
    torch.testing.assert_close(acts[rows], expected, rtol=1e-3, atol=1e-3)
    offsets = torch.arange(0, B * k + 1, k, device=device)
    latents, values = indices.flatten(), acts.flatten()
    scale = torch.tensor(2 / B, device=device)
    found = fused.reconstruct(values, latents, offsets, W, parameters["b_dec"], x, scale)
    n = len(x[rows]) * k
    part = values[:n], latents[:n], offsets[: len(x[rows]) + 1]
    residual = reference.decode(*part, W) - x[rows].float()
    torch.testing.assert_close(found.g[rows], residual * scale, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        found.grad_pre_acts[:n] / scale,
        reference.grad_values(residual, W, *part[1:]) * (part[0] > 0),
        rtol=1e-2,
        atol=1e-2,
    )
    csc = fused.to_csc(latents, offsets, F)
    by_weights = fused.grad_weights(values, latents, offsets, found.g, F, csc)
    some = torch.arange(min(F, 64), device=device)
    chosen = (latents < len(some)).nonzero().squeeze(1)
    terms = values[chosen, None] * found.g[chosen // k]
    dense = torch.zeros(len(some), d, device=device).index_add_(0, latents[chosen].long(), terms)
    torch.testing.assert_close(by_weights[some], dense, rtol=1e-3, atol=1e-5)

    states = [fused.AdamState.of(parameters[name]) for name in ("W_enc", "b_enc", "W_dec")]
    schedule = fused.Hyperparameters(torch.tensor([1e-4, 0.1, 0.001, 1.0], device=device))

    def update() -> None:
        fused.update(values, found.grad_pre_acts, csc, x, found.g, *states, schedule, parameters["b_dec"])

    calls: dict[str, tuple[Callable[[], object], float, float]] = {
        "select": (lambda: fused.select_topk(x, W, bias, k), 2 * B * F * d, 2 * (B + F) * d),
        "reconstruct": (
            lambda: fused.reconstruct(values, latents, offsets, W, parameters["b_dec"], x, scale),
            4 * B * k * d,
            B * d * 6 + min(B * k, F) * d * 2,
        ),
        "sort": (lambda: fused.to_csc(latents, offsets, F), 0, 32 * B * k),
        "grad_weights": (
            lambda: fused.grad_weights(values, latents, offsets, found.g, F, csc),
            2 * B * k * d,
            4 * (B + F) * d,
        ),
        "gradients and update": (update, 4 * B * k * d, 2 * F * d * 26 + 6 * B * d),
        "torch.linear": (lambda: torch.nn.functional.linear(x, W), 2 * B * F * d, 2 * (B + F) * d + 2 * B * F),
    }
    table: dict[str, Any] = {"recomputed_rows": int(failed.sum())}
    for name, (call, operations, n_bytes) in calls.items():
        floor = max(operations / flops, n_bytes / bandwidth) * 1e3
        taken = milliseconds(call)
        table[name] = {"ms": taken, "floor_ms": floor, "ratio": taken / floor if floor else None}
    return table


def step_time(size: Size, device: Any) -> dict[str, Any]:
    """Time a whole step, captured in a CUDA graph and not, once two runs of it agree in every bit."""
    import torch

    from thresher.train.kernels import fused

    cuda = torch.cuda.is_available()
    parameters, x = make_problem(size, device)
    options = fused.TopKOptions(size.k, float(x.float().var(0).sum()), max_norm=None)
    if size.d_sae * size.d_in <= 1 << 26:
        first, second = (fused.TopKStep(parameters, options) for _ in range(2))
        for step in (first, second):
            step.set_lr(1e-3)
            step(x)
        pairs = zip(first.parameters().values(), second.parameters().values(), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            sys.exit("two equal steps differ; no times")
        del first, second
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step = fused.TopKStep(parameters, options)
    step.set_lr(1e-4)
    before = float(step(x)[0])
    result: dict[str, Any] = {"eager_ms": milliseconds(lambda: step(x))}
    if not float(step(x)[0]) < before:
        sys.exit("the loss does not fall; no times")
    if cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(x)
        result["ms"] = milliseconds(graph.replay)
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def stream_rate(size: Size, device: Any, n_rows: int, rehearse: bool) -> dict[str, Any]:
    """Return tokens/s of training from a raw and from an int8 store, and the share of time spent waiting for data."""
    import time

    import torch

    from thresher.shared.store import ActivationStore, ActivationStoreWriter
    from thresher.train.batches import ShuffledBatches
    from thresher.train.kernels import fused

    parameters, _ = make_problem(size._replace(batch=1), device)
    rates: dict[str, Any] = {}
    context = 8 if rehearse else 1024
    for name, codec in (("raw", "none"), ("int8", "int8")):
        with tempfile.TemporaryDirectory() as folder:
            with ActivationStoreWriter(folder + "/store", {"x": size.d_in}, context, codec=codec) as writer:
                block = max(1, min(64, n_rows // context))
                for _ in range(n_rows // (block * context)):
                    writer.append({"x": torch.randn(block, context, size.d_in).to(torch.bfloat16)})
            store = ActivationStore.open(folder + "/store")
            step = fused.TopKStep(parameters, fused.TopKOptions(size.k, float(size.d_in)))
            mean, factor = torch.zeros(size.d_in, device=device), torch.ones((), device=device)
            with ShuffledBatches(store, ["x"], size.batch, 0, device) as batches:
                n_steps = max(2, n_rows // size.batch)
                waited, started = 0.0, time.perf_counter()
                for number in range(n_steps):
                    if number == n_steps // 10:
                        waited, started, first = 0.0, time.perf_counter(), number
                    asked = time.perf_counter()
                    x = next(batches)["x"]
                    waited += time.perf_counter() - asked
                    step(fused.dequantise(x, mean, factor))
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - started
            rates[name] = {
                "tokens_per_second": (n_steps - first) * size.batch / seconds,
                "data_wait_fraction": waited / seconds,
            }
    return rates


def peer_times(python: str, size: Size, rehearse: bool) -> dict[str, Any]:
    """Time each peer's step in a process of its own; a peer that cannot run says why."""
    results = {}
    for peer in PEERS:
        command = [python, str(Path(__file__).with_name("gpu_peers.py")), peer, *map(str, size[:4])]
        done = subprocess.run(command + ["--rehearse"] * rehearse, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        results[peer] = json.loads(lines[-1]) if done.returncode == 0 else {"error": done.stderr.strip()[-300:]}
    return results


def main() -> None:
    options = parse()
    if options.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no CUDA device was found; --rehearse runs the same lines without one")
    device = torch.device("cpu" if options.rehearse else "cuda")
    report: dict[str, Any] = {"device": "rehearsal" if options.rehearse else torch.cuda.get_device_name(), "sizes": []}
    for size in REHEARSAL if options.rehearse else SIZES:
        entry: dict[str, Any] = {
            "size": size._asdict(),
            "kernels": kernel_times(size, device, options.flops, options.bandwidth),
        }
        entry["step"] = step_time(size, device)
        if not options.rehearse:
            torch.cuda.empty_cache()
        if options.peers:
            entry["peers"] = peer_times(options.peers, size, options.rehearse)
        if size.d_in < 4096:
            entry["stream"] = stream_rate(
                size, device, 64 if options.rehearse else options.store_tokens, options.rehearse
            )
        report["sizes"].append(entry)
        if not options.rehearse:
            print_entry(size, entry)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1))
    print("rehearsed: every line ran; nothing was timed" if options.rehearse else f"written to {options.output}")


def print_entry(size: Size, entry: dict[str, Any]) -> None:
    """Print one size's table in Markdown."""
    print(f"\n### d={size.d_in} F={size.d_sae} k={size.k} batch {size.batch}\n\n| | ms | against |\n|---|---|---|")
    for name, row in entry["kernels"].items():
        if isinstance(row, dict):
            print(f"| {name} | {row['ms']:.3f} | {row['ratio'] or 0:.2f}x its floor of {row['floor_ms']:.3f} |")
    ours = entry["step"]["ms"]
    print(f"| **whole step** | {ours:.3f} | {ours / size.floor_ms:.2f}x the floor of {size.floor_ms} |")
    print(
        f"| without a graph | {entry['step']['eager_ms']:.3f} | {entry['step']['peak_bytes'] / 2**30:.2f} GiB at most |"
    )
    for name, row in entry.get("peers", {}).items():
        told = (
            f"| {row['ms']:.3f} | {row['ms'] / ours:.2f}x ours, {row['peak_bytes'] / 2**30:.2f} GiB |"
            if "ms" in row
            else f"| - | {row['error'][-80:]} |"
        )
        print(f"| {name} {told}")
    for name, row in entry.get("stream", {}).items():
        waits = f"waits {row['data_wait_fraction']:.1%}"
        print(f"| from a {name} store | {row['tokens_per_second']:,.0f} tokens/s | {waits} |")


if __name__ == "__main__":
    main()
